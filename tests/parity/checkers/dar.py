"""DAR: zig-zag tables, directions, coordinates, 4D-RoPE, power-cosine guidance."""

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.layers.rope2d import rope4d_table, rotate_pairs
from vgen.samplers.orders import make_order
from vgen.samplers.orders.diagonal import DIRECTIONS, START, move_directions, scan_coordinates
from vgen.samplers.schedules import power_cosine_weights


@checker("dar.tables")
def check_tables(fixture: Fixture):
    out, config = fixture.outputs, fixture.config
    names = {"right": (0, 1), "down": (1, 0), "down_left": (1, -1), "up_right": (-1, 1)}
    assert {**{name: DIRECTIONS[move] for name, move in names.items()}, "start": START} == config["directions"]
    for height, width in config["sizes"]:
        oneway = torch.cat(make_order("diagonal", (height, width), way="oneway").groups())
        assert_equal(oneway, out[f"order_{height}x{width}_oneway"], "one-way")
        for first in ("right", "down"):
            name = f"{height}x{width}_{first}"
            order = torch.cat(make_order("diagonal", (height, width), first=first).groups())
            current, target = scan_coordinates(order, width)
            assert_equal(order, out[f"order_{name}"], f"order_{name}")
            assert_equal(order.argsort(), out[f"inverse_{name}"], f"inverse_{name}")
            assert_equal(move_directions(order, width), out[f"direction_{name}"], f"direction_{name}")
            assert_equal(current, out[f"cur_{name}"], f"cur_{name}")
            assert_equal(target, out[f"nxt_{name}"], f"nxt_{name}")
    height, width = config["sizes"][0]
    order = torch.cat(make_order("diagonal", (height, width)).groups())
    for head_dim in config["head_dims"]:
        table = rope4d_table(*scan_coordinates(order, width), head_dim, config["base"])
        assert_close(table[..., 0], out[f"rope_cos_{head_dim}"], what="cos")
        assert_close(table[..., 1], out[f"rope_sin_{head_dim}"], what="sin")
        query, key = (rotate_pairs(fixture.inputs[f"{side}_{head_dim}"], table) for side in "qk")
        assert_close(query, out[f"q_{head_dim}"], what=f"q_{head_dim}")
        assert_close(key, out[f"k_{head_dim}"], what=f"k_{head_dim}")
        assert_close(query @ key.mT / head_dim**0.5, out[f"scores_{head_dim}"], what=f"scores_{head_dim}")
    for index, ramp in enumerate(config["powcos"]):
        weights = torch.tensor(power_cosine_weights(ramp["scale"], ramp["power"], ramp["T"]))
        assert_close(weights, out[f"powcos_{index}"], what=f"powcos_{index}")
