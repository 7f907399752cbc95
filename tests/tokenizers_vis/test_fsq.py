"""The finite scalar quantizer: bijective indices, every level reachable, straight-through gradients, bad levels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen.errors import VgenError
from vgen.tokenizers_vis.fsq import FiniteScalarQuantizer


@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_indices_and_codes_are_inverse(levels):
    quantizer = FiniteScalarQuantizer(tuple(levels))
    indices = torch.arange(quantizer.vocabulary)
    codes = quantizer.codes(indices)
    assert codes.shape == (quantizer.vocabulary, len(levels)) and codes.abs().max() <= 1
    assert torch.equal(quantizer.indices(codes), indices)
    assert len(codes.unique(dim=0)) == quantizer.vocabulary


@pytest.mark.parametrize("level", [2, 3, 4, 5, 8])
def test_every_level_is_reached_and_none_else(level):
    quantizer = FiniteScalarQuantizer((level,))
    codes, indices = quantizer.quantize(torch.linspace(-8, 8, 2001)[:, None])
    assert indices.unique().tolist() == list(range(level))
    assert (indices.diff() >= 0).all(), "larger inputs have larger codes"
    assert torch.equal(codes, quantizer.codes(indices)), "straight through adds nothing to the value"


def test_gradients_are_those_of_the_bound():
    quantizer = FiniteScalarQuantizer((8, 5))
    z = torch.randn(7, 2, requires_grad=True)
    quantizer.quantize(z)[0].sum().backward()
    through = z.grad.clone()
    z.grad = None
    (quantizer.bound(z) / torch.tensor([4.0, 2.0])).sum().backward()
    assert torch.allclose(through, z.grad) and (through > 0).all()


def test_low_precision_inputs_are_quantised_in_fp32():
    quantizer = FiniteScalarQuantizer((8, 8))
    z = torch.randn(64, 2).to(torch.bfloat16)
    codes, indices = quantizer.quantize(z)
    assert codes.dtype == torch.float32 and torch.equal(indices, quantizer.quantize(z.float())[1])


@pytest.mark.parametrize("levels", [(), (8, 1)])
def test_bad_levels(levels):
    with pytest.raises(VgenError, match="at least 2 levels"):
        FiniteScalarQuantizer(levels)
