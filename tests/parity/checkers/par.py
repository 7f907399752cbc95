"""PAR: order tables, masks, rope."""

import torch
from parity.registry import Fixture, assert_close, assert_equal, checker

from vgen.layers.masks import group_visible, prefix_mask
from vgen.layers.rope2d import rope2d_table, take_rows
from vgen.samplers.orders import make_order


@checker("par.tables")
def check_tables(fixture: Fixture):
    out, config = fixture.outputs, fixture.config
    for side, n in config["combos"]:
        name, tokens = f"g{side}_n{n}", side * side
        order = make_order("regions", (side, side), n=n)
        positions = torch.cat(order.groups())
        assert order.calls == n + tokens // n - 1
        assert_equal(positions, out[f"par_to_raster_{name}"], f"par_to_raster_{name}")
        assert_equal(positions.argsort(), out[f"raster_to_par_{name}"], f"raster_to_par_{name}")
        assert_equal(group_visible(tokens + n, n), out[f"mask_visible_{name}"], f"mask_visible_{name}")
        cache = -(-(tokens + 1) // 8) * 8  # one class token, rounded up to 8
        assert_equal(group_visible(cache, n), out[f"sample_mask_visible_{name}"], f"sample_mask_visible_{name}")
        if f"mask_{name}" in out:
            assert_equal(prefix_mask(group_visible(tokens + n, n)), out[f"mask_{name}"], f"mask_{name}")
        if f"freqs_cis_{name}" in out:
            table = rope2d_table(side, side, config["rope_head_dim"], config["rope_base"])
            condition, learned = torch.full((config["cls_token_num"],), -1), torch.full((n - 1,), -1)
            rows = torch.cat((condition, positions[:n], learned, positions[n:]))
            assert_close(take_rows(table, rows), out[f"freqs_cis_{name}"], what=f"freqs_cis_{name}")
