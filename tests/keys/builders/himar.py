"""Hi-MAR: B, L, H."""

from vgen.models.mar.himar import HiMAR

NAMES = {"base": "B", "large": "L", "huge": "H"}
BUILDERS = {f"himar-{name}": (lambda size=size: HiMAR(**HiMAR.size_config(size))) for name, size in NAMES.items()}
