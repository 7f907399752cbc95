"""Dense attention masks of the published families: boolean [queries, keys], True where the query sees the key."""

from __future__ import annotations

import torch
from torch import Tensor

from vgen.layers.attention import StepCausal


def group_visible(length: int, group: int) -> Tensor:
    """PAR (arXiv 2412.15119): how many leading columns each of `length` rows sees, [length] int64.

    The first `group` rows are causal; then blocks of `group` rows see each other and everything before. A last,
    incomplete block sees all columns there are.
    """
    row = torch.arange(length)
    return torch.where(row < group, row + 1, (row // group + 1) * group).clamp(max=length)


def prefix_mask(visible: Tensor, columns: int | None = None) -> Tensor:
    """[rows, columns]: row i sees the columns 0 … visible[i] - 1. columns: as many as rows by default."""
    return torch.arange(len(visible) if columns is None else columns) < visible[:, None]


def step_causal_mask(step_ids: Tensor, prefix: int = 0) -> Tensor:
    """[prefix + N, prefix + N]: positions of one step see each other and all earlier steps.

    step_ids: [N], the step of every position; the anti-diagonal number t + h + w gives NAR's mask (arXiv 2503.10696).
    prefix: condition tokens in front, causal among themselves and seen by every position.
    """
    no_padding = torch.ones(1, prefix, dtype=torch.bool)
    return StepCausal.build(no_padding, step_ids[None]).content_dense()[0, 0]
