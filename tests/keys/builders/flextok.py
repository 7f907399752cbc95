"""FlexTok and the VAEs published beside it."""

from vgen.tokenizers_vis.flextok.flextok import FlexTok
from vgen.tokenizers_vis.flextok.vae import FlexTokVAE

BUILDERS = {
    **{f"flextok-{size}": (lambda size=size: FlexTok.of_size(size)) for size in ("d12-d12", "d18-d18", "d18-d28")},
    **{f"flextok-vae-{size}": (lambda size=size: FlexTokVAE.of_size(size).vae) for size in ("c4", "c8", "c16")},
}
