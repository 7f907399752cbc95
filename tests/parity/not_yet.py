"""Families (`family`) and cases (`family.case`) of recorded runs that no issue has reached yet. This list only shrinks."""

NOT_YET = frozenset(
    {
        "arpg.inpaint",
        "arpg.model",
        "assd",
        "cosmos_dv",
        "enat",
        "larp",
        "lpd.inpaint",
        "lpd.model",
        "lumos1.ardf",
        "lumos1.crop",
        "lumos1.forward",
        "lumos1.gen",
        "lumos1.layout",
        "lumos1.masks",
        "lumos1.sample",
        "metrics",
        "nar.video",
        "randar.extrapolation",
        "randar.inpaint",
        "randar.model",
        "var",
    }
)
