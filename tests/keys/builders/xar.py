"""xAR. Its files also hold tables that the model computes."""

from vgen.models.xar.xar import SIZES, TABLES, XARModel

NAMES = {"B": "base", "L": "large", "H": "huge"}

BUILDERS = {f"xar-{NAMES[size]}": (lambda size=size: XARModel(**XARModel.size_config(size))) for size in SIZES}
RENAMES = {
    name: (lambda state: {key: value for key, value in state.items() if not any(table in key for table in TABLES)})
    for name in BUILDERS
}
