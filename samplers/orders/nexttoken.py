"""What a next-token model is fed: it predicts position p from the token at p - 1, so not every order suits it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vgen.samplers.orders.base import FixedOrder
from vgen.samplers.types import Feed, grid_coordinates


class NextTokenOrder(FixedOrder):
    """A fixed order that next-token models (LlamaGen) can follow: raster, and rows side by side (ZipAR).

    Every call feeds the tokens that were decoded (or given) since the last call, each at its own slot, and reads the
    answer for p at slot p - 1. Where the token at p - 1 is missing, the nearest decoded token in the grid (fewest steps
    up, down, left and right; the later one of equals) stands in for it; the true token overwrites it when it is there.
    """

    def feeds(self, groups: Sequence[Tensor], known: Tensor | None) -> list[Feed]:
        cells = grid_coordinates(self.grid).tolist()
        there = set() if known is None else set(known.nonzero()[:, 0].tolist())
        waiting, there = sorted(there), there | {-1}
        feeds = []
        for index, group in enumerate(part.tolist() for part in groups):
            entries = [(-1, -1)] if index == 0 else []
            # A token behind the last target changes nothing yet: it waits.
            entries += [(p, p) for p in waiting if p < max(group)]
            waiting = [p for p in waiting if p >= max(group)]
            row = {slot: i for i, (_, slot) in enumerate(entries)}
            for slot in (target - 1 for target in group):
                if slot not in row:
                    row[slot] = len(entries)
                    entries.append((slot if slot in there else _nearest(slot, there, cells), slot))
            source, slot = torch.tensor(entries).unbind(dim=1)
            feeds.append(Feed(source, slot, torch.tensor([row[target - 1] for target in group])))
            there.update(group)
            waiting += group
        return feeds


def _nearest(position: int, there: set[int], cells: Sequence[Sequence[int]]) -> int:
    """The position of `there` with the fewest grid steps to `position`; of equals the last one."""

    def distance(other: int) -> tuple[int, int]:
        return sum(abs(a - b) for a, b in zip(cells[other], cells[position])), -other

    return min((p for p in there if p >= 0), key=distance)
