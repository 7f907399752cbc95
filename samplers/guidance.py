"""Classifier-free guidance: which rows a batch is tiled to, how they are weighted, how they are mixed.

The mixed prediction is a weighted sum of the rows in fp32: u + s (c - u) has the weights (s, 1 - s). Schedules map the
share of positions known before and after a step to the scale of that step; every published family has its own, so a
schedule is a function and the table below names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import VgenError, nearest
from vgen.samplers.types import Step

# (share known before the step, share known after it, power) -> share of the way from 1 to scale
Schedule = Callable[[float, float, float], float]

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda before, after, power: 1.0,
    "linear": lambda before, after, power: after,  # ARPG, MAR: counts the tokens decoded including this step
    "linear-before": lambda before, after, power: before,  # RandAR: the first pass is unguided
    "cosine": lambda before, after, power: 0.5 * (1.0 - math.cos(math.pi * after)),
    # MDT, RAR, DAR: every checkpoint has its own power; power 0 is constant, because 0 ** 0 = 1.
    "power-cosine": lambda before, after, power: 0.5 * (1.0 - math.cos(math.pi * before**power)),
}


@dataclass(frozen=True)
class ClassifierFree:
    """cond and null rows, mixed as u + s (c - u) with s running from 1 to `scale` by `schedule` (a name in SCHEDULES).

    scale 1 means no guidance: one row, half the work. power: exponent of "power-cosine", at least 0; the other schedules
    do not read it. limits: per phase (the last one for later phases), how many positions may have been decoded in the
    phase before a step that is still guided; None: any number. The null row is run all the same, as in the released
    samplers whose `cfg_interval` this is. Source: arXiv 2207.12598, equation 6 (s = 1 + w).
    """

    scale: float = 1.0
    schedule: str = "constant"
    power: float = 1.5
    limits: tuple[int | None, ...] = ()

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise VgenError(
                f"unknown guidance schedule {self.schedule!r}{nearest(self.schedule, SCHEDULES)}; known: {', '.join(SCHEDULES)}"
            )
        if not math.isfinite(self.scale) or self.scale < 0:
            raise VgenError(
                f"the guidance scale must be a finite number of at least 0 (1: no guidance), got {self.scale}"
            )
        if not math.isfinite(self.power) or self.power < 0:
            raise VgenError(f"the guidance power must be a finite number of at least 0, got {self.power}")

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the conditions a model must run."""
        return ("cond",) if self.scale == 1 else ("cond", "null")

    def weights(self, step: Step) -> tuple[float, ...]:
        """(s, 1 - s) of this step, (1, 0) beyond the limit of its phase, or (1,)."""
        if len(self.rows) == 1:
            return (1.0,)
        limit = self.limits[min(step.phase, len(self.limits) - 1)] if self.limits else None
        if limit is not None and step.start_unknown - step.unknown[0] > limit:
            return (1.0, 0.0)
        total = max(step.start_unknown, 1)
        before, after = (1.0 - count / total for count in step.unknown)
        scale = 1.0 + (self.scale - 1.0) * SCHEDULES[self.schedule](before, after, self.power)
        return (scale, 1.0 - scale)

    def mix(self, parts: Tensor, weights: Sequence[float]) -> Tensor:
        """Weighted sum of [R, ...] in fp32."""
        return torch.einsum("r...,r->...", parts.float(), torch.tensor(weights, device=parts.device))
