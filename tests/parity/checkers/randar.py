"""RandAR: rope, extrapolated rope, tokens per pass."""

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.layers.rope2d import rope2d_extrapolated, rope2d_table
from vgen.samplers.schedules import randar_sizes


@checker("randar.tables")
def check_tables(fixture: Fixture):
    out, config = fixture.outputs, fixture.config
    base, prefix = config["rope_base"], config["cls_token_num"]
    for side, head_dim in config["ropes"]:
        name = f"rope_g{side}_hd{head_dim}"
        assert_close(rope2d_table(side, side, head_dim, base, prefix), out[name], what=name)
    for side, head_dim, factor, boundary in config["ext"]:
        name = f"rope_ext_g{side}_hd{head_dim}_f{factor}_b{boundary}"
        table = rope2d_extrapolated(side, side, head_dim, factor, boundary, base, prefix)
        assert_close(table, out[name], what=name)
    for tokens, steps in config["scheds"]:
        name = f"steps_n{tokens}_t{steps}"
        assert_equal(torch.tensor(randar_sizes(tokens, steps)), out[name], name)
