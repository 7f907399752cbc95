"""What all tokenizers share: grids, token checks, pixel values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vgen.errors import VgenError
from vgen.tokenizers_vis.base import TokenSpec, check_tokens, decode_each, encode_each, square_grid, to_uint8

sizes = st.integers(1, 12)


@given(grid=st.tuples(sizes, sizes, sizes), downsample=st.tuples(sizes, sizes, sizes))
def test_grid_and_pixels_are_inverse(grid, downsample):
    spec = TokenSpec(downsample, vocabulary=2)
    frames, height, width = spec.pixels(grid)
    assert spec.grid(height, width, frames) == grid


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((30, 32, 4), "height must be a multiple of 16 .* got 30; use 16 or 32"),
        ((32, 9, 4), "width must be a multiple of 16 .* got 9; use 16"),
        ((32, 32, 3), "frames must be a multiple of 4 .* got 3; use 4"),
        ((0, 32, 4), "height must be a multiple of 16 .* got 0; use 16"),
    ],
)
def test_other_sizes_are_refused_with_the_nearest_ones(size, message):
    with pytest.raises(VgenError, match=message):
        TokenSpec((4, 16, 16), vocabulary=8).grid(*size)


def test_square_grids():
    assert square_grid(49) == (1, 7, 7)
    with pytest.raises(VgenError, match="48 tokens"):
        square_grid(48)


def test_tokens_out_of_range():
    check_tokens(torch.tensor([[0, 7]]), 8)
    for bad in (-1, 8):
        with pytest.raises(VgenError, match=r"0\.\.7"):
            check_tokens(torch.tensor([[0, bad]]), 8)


def test_uint8_truncates():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.0078, 1.0, 3.0])).tolist() == [0, 0, 128, 128, 255, 255]


def test_a_cpu_codes_one_picture_at_a_time_in_its_plainest_layout():
    class Spy:
        device = torch.device("cpu")

        def __init__(self):
            self.seen = []

        def encode(self, pixels):
            self.seen.append((len(pixels), pixels.is_contiguous()))
            return pixels

        def decode(self, tokens, grid, condition, *, noise):
            self.seen.append((tokens.is_contiguous(), condition.tolist(), noise.seed, noise.samples.tolist()))
            return tokens

    spy, strided = Spy(), torch.rand(2, 3, 4).transpose(1, 2)
    assert torch.equal(encode_each(spy, strided), strided) and spy.seen == [(1, True)] * 2
    spy = Spy()
    made = decode_each(spy, strided, samples=torch.tensor([7, 9]), seed=5, condition=torch.tensor([0, 1]))
    assert torch.equal(made, strided) and spy.seen == [(True, [0], 5, [7]), (True, [1], 5, [9])]
