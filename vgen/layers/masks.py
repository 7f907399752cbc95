"""Dense attention masks of the published families: boolean [queries, keys], True where the query sees the key."""

from __future__ import annotations

import torch
from torch import Tensor


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
    times = torch.cat((torch.arange(-prefix, 0), step_ids))
    return times <= times[:, None]
