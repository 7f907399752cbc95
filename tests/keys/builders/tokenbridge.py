"""TokenBridge's generators. The head's causal mask, which the files hold, is computed."""

from vgen.models.mar.tokenbridge import TokenBridgeModel, renamed

NAMES = {"B": "base", "L": "large", "H": "huge"}
BUILDERS = {
    f"tokenbridge-{name}": (lambda size=size: TokenBridgeModel(**TokenBridgeModel.size_config(size)))
    for size, name in NAMES.items()
}
RENAMES = dict.fromkeys(
    BUILDERS,
    lambda state: {key: value for key, value in renamed(state).items() if key not in TokenBridgeModel.IGNORED},
)
