"""Training orders: valid step ids, the shares asked for, reproducible draws."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.samplers.mixture import OrderMixture
from vgen.samplers.orders import make_order


def draw(mixture, batch=64, seed=0):
    return mixture.sample(batch, torch.Generator().manual_seed(seed))


def test_every_row_is_a_complete_order():
    ids = draw(OrderMixture((1, 4, 4), ["raster", "neighbor", "locality"], merge_share=0.0))
    assert ids.shape == (64, 16)
    for row in ids:
        assert row.unique().tolist() == list(range(int(row.max()) + 1))  # no step is empty


def test_shares():
    raster = make_order("raster", (1, 4, 4)).step_ids()
    only = draw(OrderMixture((1, 4, 4), ["raster"], random_share=0.0, merge_share=0.0))
    assert (only == raster).all()
    half = draw(OrderMixture((1, 4, 4), ["raster"], random_share=0.5, merge_share=0.0), 400)
    assert 0.4 < (half == raster).all(dim=1).float().mean() < 0.6
    merged = draw(OrderMixture((1, 4, 4), ["raster"], random_share=0.0, merge_share=1.0))
    assert (merged == torch.maximum(raster, merged.amin(dim=1, keepdim=True))).all()


def test_draws_are_reproducible():
    mixture = OrderMixture((1, 4, 4), ["raster", "locality"])
    assert torch.equal(draw(mixture, seed=3), draw(mixture, seed=3))
    assert not torch.equal(draw(mixture, seed=3), draw(mixture, seed=4))


def test_bad_shares():
    with pytest.raises(VgenError, match="between 0 and 1"):
        OrderMixture((1, 4, 4), random_share=2.0)
