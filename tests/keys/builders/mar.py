"""MAR: B, L, H."""

from vgen.models.mar.mar import MARModel

NAMES = {"base": "B", "large": "L", "huge": "H"}
BUILDERS = {f"mar-{name}": (lambda size=size: MARModel(**MARModel.size_config(size))) for name, size in NAMES.items()}
