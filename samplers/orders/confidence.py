"""Confidence order: predict everything, keep what the model is surest of (MaskGIT, arXiv 2202.04200, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.noise import CONFIDENCE
from vgen.samplers.orders.base import BaseOrder, Call, OrderStep, order_generator
from vgen.samplers.orders.permuted import free_steps
from vgen.samplers.schedules import CONFIDENCE_SCHEDULE, CONFIDENCE_TEMPERATURE, MASKED_SCHEDULES, default_steps
from vgen.samplers.types import Canvas, Draw, Grid, Noise, grid_size


class ConfidenceOrder(BaseOrder):
    """Every call predicts all unknown positions and keeps the `Step.keep` with the highest score + Gumbel noise.

    The noise is scaled by temperature * (1 - share of the calls done), 0 in the last call; equal scores keep the
    earlier position. How many stay is known on the host, so shapes are static; which ones stay never leaves the device.
    schedule: a name of SCHEDULES (at most as many calls as unknown positions) or of MASKED_SCHEDULES, which are the
    released rules: as many calls as asked for, some of which keep nothing when they outnumber the positions.
    """

    varies = "chosen by the model"

    def __init__(self, grid: Grid, steps: int, schedule: str, temperature: float):
        self.size_rule = _size_rule(grid, steps, schedule)
        name = f"confidence-{steps}"
        if (schedule, temperature) != (CONFIDENCE_SCHEDULE, CONFIDENCE_TEMPERATURE):
            name = f"confidence:steps={steps},schedule={schedule},temperature={temperature:g}"
        super().__init__(name, grid, steps)
        self.temperature = temperature

    def sequence(self, generator: torch.Generator | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """A random surrogate: what stays depends on the model."""
        keys = torch.rand(grid_size(self.grid), dtype=torch.float64, generator=generator or order_generator(0, 0))
        return keys.argsort(stable=True), tuple(self.size_rule(len(keys)))

    def plan(self, canvas: Canvas) -> list[Call]:
        known = self.known_mask(canvas)
        left = canvas.known.shape[1] - (0 if known is None else int(known[0].sum()))
        sizes = self.size_rule(left) if left else []
        unknown = [left, *(left - done for done in accumulate(sizes))]  # before every call
        return [
            Call(
                keep=size,
                targets=lambda count=before: _unknown_positions(canvas, count),
                ratio=(index + 1) / len(sizes),
                closes=size == before,
            )
            for index, (size, before) in enumerate(zip(sizes, unknown))
        ]

    def keep(self, step: OrderStep, draw: Draw, canvas: Canvas, noise: Noise) -> Tensor | None:
        """[B, m] bool, exactly `step.keep` in every row."""
        if step.keep == step.size:
            return None
        if draw.score is None:
            raise VgenError(
                "a confidence order needs predictions with a score, this model's have none: use another order"
            )
        score = draw.score.float()
        scale = self.temperature * (1 - step.ratio)
        if scale > 0:
            score = score + scale * noise.gumbel(CONFIDENCE, step, score.shape)
        best = score.argsort(dim=1, descending=True, stable=True)[:, : step.keep]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)


def _size_rule(grid: Grid, steps: int, schedule: str) -> Callable[[int], list[int]]:
    if schedule in MASKED_SCHEDULES:
        return lambda tokens: MASKED_SCHEDULES[schedule](tokens, steps)
    return free_steps(grid, steps, schedule)


def _unknown_positions(canvas: Canvas, count: int) -> Tensor:
    """[B, count] ascending unknown positions, without synchronising."""
    return canvas.known.to(torch.int8).argsort(dim=1, stable=True)[:, :count]


def confidence_order(grid: Grid, steps: int | None, schedule: str, temperature: float) -> ConfidenceOrder:
    """`steps` calls; fewer when fewer positions are unknown."""
    return ConfidenceOrder(grid, steps or default_steps(grid_size(grid)), schedule, temperature)
