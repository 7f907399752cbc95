"""MAR: B, L, H."""

from vgen.models.mar.mar import MAR

NAMES = {"base": "B", "large": "L", "huge": "H"}
BUILDERS = {f"mar-{name}": (lambda size=size: MAR(**MAR.size_config(size))) for name, size in NAMES.items()}
