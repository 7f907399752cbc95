"""Flow matching: solvers over substeps, guidance of velocities, and the times that training draws.

A flow moves noise to data along straight lines x_t = t · noise + (1 - t) · data (arXiv 2209.03003; 2210.02747), so time
runs from 1 to 0 and the velocity dx/dt is noise - data. Solvers are free functions over a `velocity(x, t)`: what runs the
network, mixes guidance rows or records a trace is the caller's. A model that predicts data - noise passes its negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from vgen.errors import VgenError

Velocity = Callable[[Tensor, float], Tensor]  # (x, t) -> dx/dt, of x's shape
Mix = Callable[
    [Tensor, Sequence[float]], Tensor
]  # (parts [R, B, ...], one weight per row) -> [B, ...], as Guidance.mix


def even_times(steps: int) -> list[float]:
    """1, (S - 1)/S, …, 0: the ends of S equal substeps. Raises VgenError below one step."""
    if steps < 1:
        raise VgenError(f"a flow needs at least 1 step, got {steps}")
    return [i / steps for i in range(steps, -1, -1)]


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """x at the last of `times`, from x at the first: x ← x + (t' - t) · velocity(x, t), in the dtype of x.

    One call per substep; the last time is never evaluated.
    """
    for now, then in pairwise(times):
        x = x + (then - now) * velocity(x, now).to(x.dtype)
    return x


# ---- guidance of velocities ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowGuidance:
    """cond and null rows, mixed as u + s (c - u) (arXiv 2207.12598). scale s: a number (1: one row, no guidance), or a
    function of the time."""

    scale: float | Callable[[float], float] = 1.0

    def __post_init__(self):
        if not callable(self.scale) and not (math.isfinite(self.scale) and self.scale >= 0):
            raise VgenError(
                f"the guidance scale must be a finite number of at least 0 (1: no guidance), got {self.scale}"
            )

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the conditions a model must run."""
        return ("cond",) if self.scale == 1 else ("cond", "null")

    def weights(self, time: float) -> tuple[float, ...]:
        """(s, 1 - s) at `time`, or (1,)."""
        if len(self.rows) == 1:
            return (1.0,)
        scale = self.scale(time) if callable(self.scale) else self.scale
        return (scale, 1.0 - scale)

    def start(self) -> Mix:
        """The mixing function of one trajectory; here it has no memory."""
        return weighted_sum


def weighted_sum(parts: Tensor, weights: Sequence[float]) -> Tensor:
    """[R, B, ...] -> [B, ...] in fp32."""
    return sum(weight * part for weight, part in zip(weights, parts.float()))


@dataclass(frozen=True)
class ProjectedGuidance(FlowGuidance):
    """Adaptive projected guidance (APG, arXiv 2410.02416, algorithm 1): the update c - u is averaged over the substeps
    (with a *negative* momentum, so recent directions are damped), shortened to at most `threshold`, and of its part along c
    only the share `parallel` is kept, because that part is what oversaturates."""

    scale: float | Callable[[float], float] = 7.5
    momentum: float = -0.5
    threshold: float = 2.5
    parallel: float = 0.0

    def start(self) -> Mix:
        """A mixing function with an empty running average."""
        return weighted_sum if len(self.rows) == 1 else _Projection(self)


@dataclass
class _Projection:
    """One trajectory of ProjectedGuidance. Norms and products are per sample, over everything but the batch."""

    settings: ProjectedGuidance
    average: Tensor | float = field(default=0.0)

    def __call__(self, parts: Tensor, weights: Sequence[float]) -> Tensor:
        """parts [2, B, ...] (cond, null), weights (s, 1 - s) -> [B, ...] in fp32."""
        cond, null = parts.float()
        self.average = cond - null + self.settings.momentum * self.average
        update = self.average.flatten(1).double()  # [B, E]; the projection takes small differences of large sums
        update = update * (self.settings.threshold / update.norm(dim=1, keepdim=True)).clamp(max=1.0)
        along = torch.nn.functional.normalize(cond.flatten(1).double(), dim=1)
        parallel = (update * along).sum(dim=1, keepdim=True) * along
        update = update - parallel + self.settings.parallel * parallel
        return cond + (weights[0] - 1.0) * update.view_as(cond).float()


# ---- times of training -----------------------------------------------------------------------------------------------


def mode_times(uniform: Tensor, scale: float) -> Tensor:
    """Times from U(0, 1) draws, denser in the middle for scale > 0 and uniform for 0 (SD3, arXiv 2403.03206, section 3.1)."""
    return 1.0 - uniform - scale * (torch.cos(math.pi / 2 * uniform).square() - 1.0 + uniform)


def noisy(data: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """x_t = t · noise + (1 - t) · data for times [B]."""
    t = times.view(-1, *(1,) * (data.dim() - 1))
    return t * noise + (1.0 - t) * data
