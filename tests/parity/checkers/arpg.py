"""ARPG: rope and tokens per step."""

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.layers.rope2d import rope2d_table
from vgen.samplers.schedules import arpg_sizes


@checker("arpg.tables")
def check_tables(fixture: Fixture):
    out, config = fixture.outputs, fixture.config
    for side, head_dim in config["ropes"]:
        table = rope2d_table(side, side, head_dim, config["rope_base"], config["cls_token_num"])
        assert_close(table, out[f"rope_g{side}_hd{head_dim}"], what=f"rope_g{side}_hd{head_dim}")
    for tokens, steps, schedule in config["scheds"]:
        name = f"steps_n{tokens}_t{steps}_{schedule}"
        assert_equal(torch.tensor(arpg_sizes(tokens, steps, schedule)), out[name], name)
