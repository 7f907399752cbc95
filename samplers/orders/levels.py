"""Level after level: an order for every grid of a canvas, coarse to fine (Hi-MAR, arXiv 2505.20288)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.orders.base import BaseOrder, Call
from vgen.samplers.orders.frames import moved
from vgen.samplers.types import Canvas, Draw, Noise, Step, grid_size


class LevelsOrder(BaseOrder):
    """Every level of the canvas in an order of its own. A level is a phase, with guidance, choice and `Step.unknown` of its own.

    inner: one order per level, on the level's grid; phases that they have themselves are given up. They should not share a
    seed. `grid` is a row of all positions: the levels differ in size, so the whole has no other shape.
    """

    def __init__(self, inner: Sequence[BaseOrder]):
        self.inner = tuple(inner)
        self.levels = tuple(order.grid for order in inner)
        self.varies = next((order.varies for order in inner if order.varies), "")
        name = " then ".join(order.name for order in inner)
        super().__init__(name, (1, 1, sum(map(grid_size, self.levels))), sum(order.calls for order in inner))

    def sequence(self, generator: torch.Generator | None = None) -> tuple[Tensor, tuple[int, ...]]:
        positions, sizes = zip(*(order.sequence(generator) for order in self.inner))
        shifted = [part + self._first(level) for level, part in enumerate(positions)]
        return torch.cat(shifted), tuple(size for part in sizes for size in part)

    def plan(self, canvas: Canvas) -> list[Call]:
        if canvas.levels != self.levels:
            raise VgenError(
                f"order {self.name!r} was made for levels of {_shapes(self.levels)}, the canvas has {_shapes(canvas.levels)}"
            )
        calls = []
        for level, order in enumerate(self.inner):
            planned = order.plan(canvas.part(level))
            calls += [replace(moved(call, level, self._first(level)), phase=level) for call in planned]
        return calls

    def keep(self, step: Step, draw: Draw, canvas: Canvas, noise: Noise) -> Tensor | None:
        return self.inner[step.phase].keep(step, draw, canvas, noise)

    def _first(self, level: int) -> int:
        """Canvas position of a level's first token."""
        return sum(map(grid_size, self.levels[:level]))


def _shapes(levels: Sequence[tuple[int, int, int]]) -> str:
    return " and ".join("x".join(map(str, grid)) for grid in levels)
