"""Masks of PAR and NAR."""

import torch

from vgen.layers.masks import group_visible, prefix_mask, step_causal_mask


def test_group_mask_is_causal_then_blockwise():
    assert group_visible(10, 4).tolist() == [1, 2, 3, 4, 8, 8, 8, 8, 10, 10]  # the last block is cut by the table
    assert group_visible(5, 1).tolist() == [1, 2, 3, 4, 5]
    mask = prefix_mask(torch.tensor([1, 3]), 4)
    assert mask.tolist() == [[True, False, False, False], [True, True, True, False]]


def test_step_causal_mask():
    mask = step_causal_mask(torch.tensor([0, 1, 1, 0]), prefix=2)
    assert mask[:2].tolist() == [[True] + [False] * 5, [True, True] + [False] * 4]
    assert mask[2:, :2].all()
    assert mask[2:, 2:].tolist() == [
        [True, False, False, True],
        [True, True, True, True],
        [True, True, True, True],
        [True, False, False, True],
    ]
