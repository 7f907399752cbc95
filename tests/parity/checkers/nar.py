"""NAR: wavefront orders, distance masks, rope."""

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.layers.masks import step_causal_mask
from vgen.layers.rope2d import rope2d_table
from vgen.samplers.orders import make_order


@checker("nar.tables")
def check_tables(fixture: Fixture):
    out, config = fixture.outputs, fixture.config
    grids = {f"2d_{side}": (side, side) for side in config["grids"]}
    grids |= {f"3d_{'x'.join(map(str, video))}": tuple(video) for video in config["videos"]}
    for name, grid in grids.items():
        order = make_order("neighbor", grid)
        sizes = torch.tensor([len(group) for group in order.groups()])
        assert order.calls == sum(order.grid) - 2
        assert_equal(torch.cat(order.groups()), out[f"order{name}"], f"order{name}")
        assert_equal(sizes, out[f"len{name}"], f"len{name}")
        prefix = 1 if name.startswith("3d") else 0  # video masks are recorded with the class token
        assert_equal(step_causal_mask(order.step_ids(), prefix), out[f"mask{name}"], f"mask{name}")
    for side, head_dim, base, prefix in config["rope"]:
        name = f"rope2d_{side}_{head_dim}_{base:g}_{prefix}"
        assert_close(rope2d_table(side, side, head_dim, base, prefix), out[name], what=name)
