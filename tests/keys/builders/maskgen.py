"""MaskGen: VQ and KL."""

from vgen.models.masked.maskgen import MaskGenVQModel
from vgen.models.masked.maskgen_kl import MaskGenKLModel

BUILDERS = {
    f"maskgen-{kind}_{size.lower()}": (lambda model=model, size=size: model(**model.size_config(size)))
    for kind, model in (("vq", MaskGenVQModel), ("kl", MaskGenKLModel))
    for size in model.SIZES
}
# The .bin files hold the tied table a second time, as the head.
RENAMES = {
    f"maskgen-vq_{size.lower()}": (lambda state: {key: v for key, v in state.items() if key != "lm_head.weight"})
    for size in MaskGenVQModel.SIZES
}
