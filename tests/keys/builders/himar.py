"""Hi-MAR: B, L, H."""

from vgen.models.mar.himar import HiMARModel

NAMES = {"base": "B", "large": "L", "huge": "H"}
BUILDERS = {
    f"himar-{name}": (lambda size=size: HiMARModel(**HiMARModel.size_config(size))) for name, size in NAMES.items()
}
