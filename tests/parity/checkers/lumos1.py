"""Lumos-1: MM-RoPE positions and tables."""

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.layers.mmrope import FrameLayout, rope_tables, sequence_positions


@checker("lumos1.positions")
def check_positions(fixture: Fixture) -> None:
    layout = fixture.config["token_layout"]
    frames = FrameLayout(
        image_start=layout["image_start"],
        image_end=layout["image_end"],
        size_zero=layout["size_zero"],
        patch=layout["patch"],
        stride=layout["sstride"],
        time_stride=layout["tstride"],
    )
    cases = sorted(name.removeprefix("ids_") for name in fixture.inputs if name.startswith("ids_"))
    assert cases
    for case in cases:
        positions, content = sequence_positions(fixture.inputs[f"ids_{case}"][0], frames)
        assert_equal(content[None], fixture.outputs[f"pos_flag_{case}"], f"content flags of case {case}")
        index = torch.arange(len(positions))
        assert_equal(index[None], fixture.outputs[f"pos_text_{case}"], f"text index of case {case}")
        for axis, name in enumerate("thw"):
            assert_equal(positions[None, :, axis], fixture.outputs[f"pos_{name}_{case}"], f"{name} of case {case}")
        for head_dim in fixture.config["head_dims"]:
            cos, sin = rope_tables(positions[None], head_dim, fixture.config["rope_theta"])
            assert_close(cos, fixture.outputs[f"cos{head_dim}_{case}"], what=f"cos{head_dim} of case {case}")
            assert_close(sin, fixture.outputs[f"sin{head_dim}_{case}"], what=f"sin{head_dim} of case {case}")
