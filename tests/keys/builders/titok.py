"""TiTok and TA-TiTok (the MaskGIT-VQGAN table is with RAR, whose tokenizer it is)."""

from vgen.tokenizers_vis.titok.legacy import SIZES as LEGACY_SIZES
from vgen.tokenizers_vis.titok.legacy import TiTokLegacy
from vgen.tokenizers_vis.titok.titok import TiTokVAE, TiTokVQ

BUILDERS = {
    **{f"titok-{size}": (lambda size=size: TiTokLegacy.of_size(size)) for size in LEGACY_SIZES},
    **{f"titok-{size}_vq8k": (lambda size=size: TiTokVQ.of_size(size)) for size in ("bl64", "bl128", "sl256")},
    **{f"titok-{size}_vae_c16": (lambda size=size: TiTokVAE.of_size(size)) for size in ("ll32", "bl64", "bl128")},
    **{
        f"titok-tatitok_{size}_vq": (lambda size=size: TiTokVQ.of_size(f"ta-{size}"))
        for size in ("bl32", "bl64", "bl128")
    },
    **{
        f"titok-tatitok_{size}_vae": (lambda size=size: TiTokVAE.of_size(f"ta-{size}"))
        for size in ("bl32", "bl64", "sl128")
    },
}
