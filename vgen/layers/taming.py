"""Names of the VQGAN family's checkpoints (taming-transformers, LDM, MAR, VAR, Chameleon) in terms of `vgen/layers/conv.py`.

The layers are the same; what differs is how they are called: `encoder.down.0.block.1` there is `encoder.conv_blocks.0.res.1` here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_MIDDLE = {"block_1": 0, "attn_1": 1, "block_2": 2}
_LEVEL = re.compile(r"^(encoder\.down|decoder\.up)\.(\d+)\.(.+)$")
_MIDDLE_PART = re.compile(r"^((?:en|de)coder\.mid)\.(block_1|attn_1|block_2)\.(.+)$")
_FUSED = re.compile(r"^(.+)\.qkv\.(weight|bias)$")


def rename_taming(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A state dict with the names of `conv.Encoder` (as `encoder`) and `conv.Decoder` (as `decoder`); other keys stay.

    levels: resolutions of the nets. Files index the decoder's levels from the finest, which runs last; conv.py in the order
    in which they run. A fused 1x1 convolution `qkv` (VAR) becomes `q`, `k` and `v`.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _rename(key, levels)
        if fused := _FUSED.match(name):
            base, kind = fused.groups()
            renamed |= {f"{base}.{part}.{kind}": rows for part, rows in zip("qkv", value.chunk(3))}
        else:
            renamed[name] = value
    return renamed


def _rename(key: str, levels: int) -> str:
    if found := _LEVEL.match(key):
        side, level, rest = found[1], int(found[2]), found[3]
        if side == "decoder.up":
            level = levels - 1 - level
        return f"{side.split('.')[0]}.conv_blocks.{level}.{re.sub(r'^block', 'res', rest)}"
    if found := _MIDDLE_PART.match(key):
        return f"{found[1]}.{_MIDDLE[found[2]]}.{found[3]}"
    return key
