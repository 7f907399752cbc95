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


@pytest.mark.parametrize(
    "side, config, groups",
    [
        (64, {}, [[0, 1, 2, 3], [4, 4, 4, 4]]),  # small pictures by fours, the last one standing in
        (256, {}, [[0], [1], [2], [3], [4]]),
        (64, {"steps": 20}, [[0], [1], [2], [3], [4]]),  # a picture that nobody needs would cost as many steps
    ],
)
def test_a_cpu_codes_equally_many_pictures_at_a_time(side, config, groups):
    class Spy:
        device, spec = torch.device("cpu"), TokenSpec((1, side // 2, side // 2), vocabulary=9)

        def __init__(self):
            self.config, self.seen = config, []

        def encode(self, pixels):
            self.seen.append((pixels[:, 0, 0, 0].tolist(), pixels.is_contiguous()))
            return pixels[:, 0, :2, :2].flatten(1)

        def decode(self, tokens, grid, condition, *, noise):
            self.seen.append((tokens[:, 0].tolist(), condition.tolist(), noise.seed, noise.samples.tolist()))
            return tokens

    numbers = torch.arange(5.0)
    spy, strided = Spy(), numbers.expand(3, side, side, 5).permute(3, 0, 1, 2)
    tokens = encode_each(spy, strided)
    assert spy.seen == [(group, True) for group in groups] and torch.equal(tokens[:, 0], numbers)
    spy = Spy()
    made = decode_each(spy, tokens, samples=torch.arange(5) + 7, seed=5, condition=torch.arange(5))
    assert torch.equal(made, tokens)
    assert spy.seen == [(group, group, 5, [7 + number for number in group]) for group in groups]
