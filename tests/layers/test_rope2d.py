"""Rope of the LlamaGen family: zero rows, relative positions, DAR's four coordinates, RandAR's extrapolation."""

import pytest
import torch

from vgen.errors import VgenError
from vgen.layers.rope2d import rope2d_extrapolated, rope2d_table, rope4d_table, rotate_pairs, take_rows


def scores(table, head_dim):
    query, key = torch.randn(2, 1, 1, 1, head_dim, generator=torch.Generator().manual_seed(0)).expand(
        -1, 2, 3, len(table), -1
    )
    return rotate_pairs(query, table) @ rotate_pairs(key, table).mT


def test_condition_rows_are_zero():
    table = rope2d_table(2, 3, 8, prefix=2)
    assert table.shape == (8, 4, 2)
    assert not table[:2].any()
    assert torch.equal(table[2, :, 0], torch.ones(4))
    assert not rotate_pairs(torch.randn(1, 1, 8, 8), table)[:, :, :2].any()


def test_first_half_turns_with_the_row():
    table = rope2d_table(3, 4, 8).view(3, 4, 4, 2)
    assert torch.equal(table[:, 0, :2], table[:, 3, :2])
    assert torch.equal(table[0, :, 2:], table[2, :, 2:])
    assert torch.equal(table[2, 0, :2], table[0, 2, 2:])  # the same angles for rows and columns


def test_scores_depend_on_differences_only():
    score = scores(rope2d_table(4, 4, 16), 16)
    at = lambda y, x: y * 4 + x  # noqa: E731
    torch.testing.assert_close(score[..., at(0, 1), at(1, 3)], score[..., at(2, 0), at(3, 2)])
    assert (score[..., at(0, 1), at(1, 3)] - score[..., at(0, 1), at(3, 1)]).abs().max() > 1e-3


def test_tables_per_sample_and_dtype():
    table = rope2d_table(2, 2, 8)
    rows = torch.tensor([[3, 1, -1], [0, 2, 1]])
    x = torch.randn(2, 3, 3, 8)
    together = rotate_pairs(x, take_rows(table, rows))
    for sample in range(2):
        torch.testing.assert_close(together[sample], rotate_pairs(x[sample], take_rows(table, rows[sample])))
    assert not together[0, :, 2].any()
    assert rotate_pairs(x.bfloat16(), table[:3]).dtype is torch.bfloat16


def test_dar_scores_depend_on_the_differences_of_all_four_coordinates():
    current, target = torch.randint(0, 9, (2, 6, 2), generator=torch.Generator().manual_seed(1))
    shift = torch.tensor([3, 5])
    plain = scores(rope4d_table(current, target, 16), 16)
    torch.testing.assert_close(scores(rope4d_table(current + shift, target + 2 * shift, 16), 16), plain)
    moved = torch.cat((target[:1] + 1, target[1:]))
    assert (scores(rope4d_table(current, moved, 16), 16) - plain).abs().max() > 1e-3


def test_extrapolation_interpolates_the_low_frequencies():
    small, large = rope2d_table(4, 4, 16), rope2d_extrapolated(8, 8, 16, factor=2.0, boundary=1)
    assert torch.equal(large[7 * 8, :1], rope2d_table(8, 8, 16)[7 * 8, :1])  # high: extrapolated
    torch.testing.assert_close(large[7 * 8, 1:4], small[3 * 4, 1:4])  # low: the last row is where it was in training
    torch.testing.assert_close(rope2d_extrapolated(4, 4, 16, 1.0, 2, prefix=1), rope2d_table(4, 4, 16, prefix=1))


def test_bad_head_sizes():
    with pytest.raises(VgenError, match="multiple of 4"):
        rope2d_table(2, 2, 6)
    with pytest.raises(VgenError, match="multiple of 8"):
        rope4d_table(torch.zeros(1, 2), torch.zeros(1, 2), 12)
