"""The finite scalar quantizer: bijective indices, every level reachable, straight-through gradients, bad levels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgen.errors import VgenError
from vgen.tokenizers_vis.latents.fsq import FiniteScalarQuantizer


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


def test_the_first_channel_counts_in_ones_and_zero_is_the_middle_level():
    """FSQ, arXiv 2309.15505: little-endian digits; z = 0 is the level L // 2 of every channel, odd or even."""
    quantizer = FiniteScalarQuantizer((8, 5, 3))
    assert quantizer.indices(torch.tensor([[-1.0, -1.0, -1.0], [-0.75, -1.0, -1.0], [-1.0, -0.5, -1.0]])).tolist() == [
        0,
        1,
        8,
    ]
    assert quantizer.codes(torch.tensor([40, 119])).tolist() == [[-1.0, -1.0, 0.0], [0.75, 1.0, 1.0]]
    codes, indices = quantizer.quantize(torch.zeros(1, 3))
    assert codes.tolist() == [[0.0, 0.0, 0.0]] and indices.tolist() == [4 + 2 * 8 + 1 * 40]
    assert quantizer.bound(torch.zeros(1, 3)).abs().max() < 1e-6
    large = quantizer.quantize(torch.tensor([[9.0, 9.0, 9.0], [-9.0, -9.0, -9.0]]))[0]
    assert large.tolist() == [[0.75, 1.0, 1.0], [-1.0, -1.0, -1.0]]
