"""MM-RoPE: axes, tables, and the property rotary positions exist for."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.layers.mmrope import frequency_axes, rope_tables, rotate, text_positions, visual_positions
from vgen.samplers.types import grid_coordinates


def test_axes_are_dealt_2_3_3():
    axes = frequency_axes(128)
    assert torch.bincount(axes).tolist() == [16, 24, 24]
    assert torch.equal(axes[:16], axes[16:32])
    with pytest.raises(VgenError, match="multiple of 32"):
        frequency_axes(48)


def test_text_is_one_dimensional_rope():
    cos, sin = rope_tables(text_positions(7), 32)
    angles = torch.arange(7)[:, None] * 10000.0 ** (-torch.arange(16) / 16)
    assert torch.allclose(cos, angles.cos().repeat(1, 2), atol=1e-5)
    assert torch.allclose(sin, angles.sin().repeat(1, 2), atol=1e-5)


def test_scores_depend_on_differences_only():
    query, key = torch.randn(2, 1, 1, 1, 64)

    def score(a, b):
        turned = [rotate(x, rope_tables(torch.tensor([[p]]), 64)) for x, p in ((query, a), (key, b))]
        return (turned[0] * turned[1]).sum()

    assert torch.allclose(score([5, 9, 2], [1, 3, 8]), score([15, 29, 32], [11, 23, 38]), atol=1e-4)
    assert not torch.allclose(score([5, 9, 2], [1, 3, 8]), score([5, 9, 3], [1, 3, 8]), atol=1e-4)


def test_visual_positions_are_offset_and_scaled():
    positions = visual_positions(grid_coordinates((2, 2, 2)), torch.tensor([3, 10]))
    assert positions.shape == (2, 8, 3)
    assert positions[0, 7].tolist() == [3 + 4, 3 + 8, 3 + 8]
    assert positions[1, 0].tolist() == [10, 10, 10]


def test_visual_positions_are_frame_row_and_column_behind_the_prefix():
    """o + (4 frame, 8 row, 8 column), Lumos-1; the axes in that order."""
    found = visual_positions(torch.tensor([[0, 0, 0], [1, 2, 3]]), torch.tensor([5, 7]))
    assert found.tolist() == [[[5, 5, 5], [9, 21, 29]], [[7, 7, 7], [11, 23, 31]]]


def test_rotation_turns_the_first_half_towards_the_second():
    """RoFormer, arXiv 2104.09864, equation 13, on the pairs (i, i + D/2): (1, 0) becomes (cos, sin)."""
    cos, sin = rope_tables(torch.tensor([[3, 1, 2]]), 32)
    x = torch.cat((torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1, 16)), dim=-1)
    turned = rotate(x, (cos, sin))[0, 0, 0]
    torch.testing.assert_close(turned, torch.cat((cos[0, :16], sin[0, :16])))
    angle = 3.0 if frequency_axes(32)[0] == 0 else float("nan")  # the first pair turns with time, by one radian a step
    assert turned[16].item() == pytest.approx(torch.tensor(angle).sin().item(), abs=1e-6)
