"""Names of the VQGAN family's checkpoints (taming-transformers, LDM, MAR, VAR, Chameleon) in terms of `vgen/layers/conv.py`.

The layers are the same; what differs is how they are called: `encoder.down.0.block.1` there is `encoder.conv_blocks.0.res.1` here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vgen.errors import VgenError

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


@dataclass(frozen=True)
class TamingFacts:
    """What the names and shapes of a file of the VQGAN family say about its nets.

    ch: base width; ch_mult: width multipliers, finest level first; num_res_blocks: per level of the encoder; attention_levels: with
    attention after every ResBlock (0: finest), of the encoder and of the decoder; z_channels: what the decoder reads; double_z: the
    encoder makes twice as many (mean and log-variance of a VAE).
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    decoder_attention: tuple[int, ...]
    z_channels: int
    double_z: bool


def taming_facts(state: Mapping[str, Tensor]) -> TamingFacts:
    """The facts of a file under its own names. Raises VgenError for a file of another family."""
    found = {"block": {}, "attn": {}, "up": {}}
    for key in state:
        if match := re.match(r"^encoder\.down\.(\d+)\.(block|attn)\.(\d+)\.", key):
            found[match[2]].setdefault(int(match[1]), set()).add(int(match[3]))
        elif match := re.match(r"^decoder\.up\.(\d+)\.attn\.", key):
            found["up"][int(match[1])] = set()
    blocks, wanted = found["block"], ("encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_in.weight")
    missing = [key for key in wanted if key not in state] or ([] if blocks else ["encoder.down.0.block.0.conv1.weight"])
    if missing or set(blocks) != set(range(len(blocks))):
        raise VgenError(
            f"this is no checkpoint of the VQGAN family: expected {missing[0] if missing else 'levels without a gap'}, found "
            f"{', '.join(sorted(state)[:3]) or 'nothing'}, …; choose the family that the file was trained with"
        )
    if state["encoder.conv_in.weight"].shape[1] != 3:
        raise VgenError(f"this VQGAN reads {state['encoder.conv_in.weight'].shape[1]} channels, vgen's pictures have 3")
    ch = state["encoder.conv_in.weight"].shape[0]
    widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(len(blocks))]
    if any(width % ch for width in widths):
        raise VgenError(f"the widths {widths} of this VQGAN are no multiples of its base width {ch}")
    features, z_channels = state["encoder.conv_out.weight"].shape[0], state["decoder.conv_in.weight"].shape[1]
    return TamingFacts(
        ch,
        tuple(width // ch for width in widths),
        len(blocks[0]),
        tuple(sorted(found["attn"])),
        tuple(sorted(found["up"])),
        z_channels,
        features == 2 * z_channels,
    )
