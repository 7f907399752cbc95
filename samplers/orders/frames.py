"""Frame after frame, each in an order of its own (video models; Lumos-1 decodes every frame like MaskGIT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vgen.samplers.orders.base import BaseOrder, Call
from vgen.samplers.types import Canvas, Draw, Grid, Noise, Step, grid_size


class FramesOrder(BaseOrder):
    """T orders, one per frame; the last step of a frame `closes` it, and `Step.unknown` counts within the frame.

    inner: T orders of the same kind over (1, H, W), with seeds of their own.
    """

    def __init__(self, grid: Grid, inner: Sequence[BaseOrder]):
        super().__init__(f"frames-{inner[0].name}", grid, sum(order.calls for order in inner))
        self.inner = tuple(inner)
        self.varies = inner[0].varies
        self.frame_size = grid_size((1, *grid[1:]))

    def sequence(self, generator: torch.Generator | None = None) -> tuple[Tensor, tuple[int, ...]]:
        positions, sizes = zip(*(order.sequence(generator) for order in self.inner))
        shifted = [part + frame * self.frame_size for frame, part in enumerate(positions)]
        return torch.cat(shifted), tuple(size for part in sizes for size in part)

    def plan(self, canvas: Canvas) -> list[Call]:
        self.known_mask(canvas)
        calls = []
        for frame, order in enumerate(self.inner):
            first = frame * self.frame_size
            part = slice(first, first + self.frame_size)
            # Views, not copies: an adaptive inner order sees what the loop has written.
            view = Canvas((order.grid,), canvas.values[:, part], canvas.known[:, part], canvas.samples)
            calls += [moved(call, frame, first) for call in order.plan(view)]
        return calls

    def keep(self, step: Step, draw: Draw, canvas: Canvas, noise: Noise) -> Tensor | None:
        return self.inner[0].keep(step, draw, canvas, noise)


def moved(call: Call, frame: int, offset: int) -> Call:
    """A call of the order of a part (a frame, a level), as a call on the whole canvas."""
    feed = call.feed and replace(
        call.feed, source=_shift(call.feed.source, offset), slot=_shift(call.feed.slot, offset)
    )
    return replace(call, targets=lambda: call.targets() + offset, span=(frame, *call.span), feed=feed)


def _shift(positions: Tensor, offset: int) -> Tensor:
    return torch.where(positions < 0, positions, positions + offset)  # -1 stays the condition
