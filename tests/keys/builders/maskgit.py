"""MaskGIT over TiTok tokens: both networks."""

from vgen.models.masked.maskgit import MaskGITUViTModel, MaskGITViTModel

BUILDERS = {
    f"maskgit-{size.lower().replace('-', '')}": (lambda model=model, size=size: model(**model.size_config(size)))
    for model in (MaskGITViTModel, MaskGITUViTModel)
    for size in model.SIZES
}
