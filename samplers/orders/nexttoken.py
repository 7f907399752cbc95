"""What a next-token model is fed: it predicts position p from the token at p - 1, so not every order suits it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vgen.samplers.orders.base import FixedOrder
from vgen.samplers.types import Feed, Grid, grid_coordinates


class Feeding:
    """Plans feeds call by call.

    Every call feeds the tokens that were decoded (or given) since the last call, each at its own slot, and reads the
    answer for p at slot p - 1. Where the token at p - 1 is missing, the nearest decoded token in the grid (fewest steps
    up, down, left and right; the later one of equals) stands in for it; the true token overwrites it when it is there.
    known: [N] bool, what is given, or None.
    """

    def __init__(self, grid: Grid, known: Tensor | None):
        self.cells = grid_coordinates(grid).tolist()
        given = [] if known is None else known.nonzero()[:, 0].tolist()
        self.there, self.waiting, self.first = {-1, *given}, sorted(given), True

    def next(self, targets: Sequence[int]) -> Feed:
        """The feed of the next call, which asks for `targets`."""
        entries = [(-1, -1)] if self.first else []
        self.first = False
        # A token behind the last target changes nothing yet: it waits.
        entries += [(p, p) for p in self.waiting if p < max(targets)]
        self.waiting = [p for p in self.waiting if p >= max(targets)]
        row = {slot: i for i, (_, slot) in enumerate(entries)}
        for slot in (target - 1 for target in targets):
            if slot not in row:
                row[slot] = len(entries)
                entries.append((slot if slot in self.there else self._nearest(slot), slot))
        source, slot = torch.tensor(entries).unbind(dim=1)
        return Feed(source, slot, torch.tensor([row[target - 1] for target in targets]))

    def write(self, positions: Sequence[int]) -> None:
        """Notes the positions that are decoded now."""
        self.there.update(positions)
        self.waiting += positions

    def _nearest(self, position: int) -> int:
        """The position that is there with the fewest grid steps to `position`; of equals the last one."""

        def distance(other: int) -> tuple[int, int]:
            return sum(abs(a - b) for a, b in zip(self.cells[other], self.cells[position])), -other

        return min((p for p in self.there if p >= 0), key=distance)


class NextTokenOrder(FixedOrder):
    """A fixed order that next-token models (LlamaGen) can follow: raster, and rows side by side (ZipAR). See `Feeding`."""

    def feeds(self, groups: Sequence[Tensor], known: Tensor | None) -> list[Feed]:
        feeding, feeds = Feeding(self.grid, known), []
        for group in (part.tolist() for part in groups):
            feeds.append(feeding.next(group))
            feeding.write(group)
        return feeds
