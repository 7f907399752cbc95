"""Names of the VQGAN family's checkpoints: both halves, level order, fused projections, everything else."""

from __future__ import annotations

import torch

from vgen.layers.conv import Decoder, Encoder
from vgen.layers.taming import rename_taming

TINY = {"channels": 4, "multipliers": (1, 2, 3), "blocks": 1, "groups": 2, "attention_levels": (1,)}
OLD = {"mid.0": "mid.block_1", "mid.1": "mid.attn_1", "mid.2": "mid.block_2"}


def taming_names(net: torch.nn.Module, side: str) -> dict[str, torch.Tensor]:
    """The state dict of a net under the old names, written down independently of the table under test."""
    state = {}
    for key, value in net.state_dict().items():
        parts = key.split(".")
        if parts[0] == "conv_blocks":
            level = int(parts[1]) if side == "encoder" else 2 - int(parts[1])
            parts[:3] = ["down" if side == "encoder" else "up", str(level), {"res": "block"}.get(parts[2], parts[2])]
        elif parts[0] == "mid":
            parts[:2] = OLD[".".join(parts[:2])].split(".")
        state[".".join((side, *parts))] = value
    return state


def test_both_halves_find_their_names():
    encoder, decoder = Encoder(in_channels=3, out_channels=5, **TINY), Decoder(in_channels=5, out_channels=3, **TINY)
    old = {**taming_names(encoder, "encoder"), **taming_names(decoder, "decoder")}
    assert "encoder.down.1.attn.0.proj_out.weight" in old and "decoder.up.2.upsample.conv.bias" in old
    new = rename_taming({**old, "quant_conv.bias": torch.ones(1)}, levels=3)
    expected = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    expected |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    assert new.keys() == {*expected, "quant_conv.bias"}
    assert all(new[key] is value or torch.equal(new[key], value) for key, value in expected.items())


def test_fused_projections_are_split():
    weight = torch.arange(12.0).view(12, 1, 1, 1)
    new = rename_taming({"decoder.up.0.attn.0.qkv.weight": weight}, levels=3)
    assert {key: value.flatten().tolist()[0] for key, value in new.items()} == {
        "decoder.conv_blocks.2.attn.0.q.weight": 0,
        "decoder.conv_blocks.2.attn.0.k.weight": 4,
        "decoder.conv_blocks.2.attn.0.v.weight": 8,
    }
