"""Flow matching: solvers over substeps, guidance of velocities, and the times that training draws.

A flow moves noise to data along straight lines x_t = t · noise + (1 - t) · data (arXiv 2209.03003; 2210.02747), so time
runs from 1 to 0 and the velocity dx/dt is noise - data. Solvers are free functions over a `velocity(x, t)`: what runs the
network, mixes guidance rows or records a trace is the caller's. A model that predicts data - noise passes its negative.

diffusers' FlowMatchEulerDiscreteScheduler takes the same Euler steps, in fp32. It is not used because it keeps the place in
one trajectory as its state, whereas here several run inside each other (an entity's in a picture's), and because it has
neither the SDE of xAR, whose state is fp64, nor jumps along average velocities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from vgen.errors import VgenError, nearest

SDE_END = 0.04  # time of the last noisy state of `sde`

Velocity = Callable[[Tensor, float], Tensor]  # (x, t) -> dx/dt, of x's shape
Mix = Callable[
    [Tensor, Sequence[float]], Tensor
]  # (parts [R, B, ...], one weight per row) -> [B, ...], as Guidance.mix


def even_times(steps: int) -> list[float]:
    """1, (S - 1)/S, …, 0: the ends of S equal substeps. Raises VgenError below one step."""
    if steps < 1:
        raise VgenError(f"a flow needs at least 1 step, got {steps}")
    return [i / steps for i in range(steps, -1, -1)]


def shifted_times(times: Sequence[float], shift: float) -> list[float]:
    """a t / (1 + (a - 1) t) for every t (SD3, arXiv 2403.03206, equation 23): a > 1 moves times towards the noise."""
    return [shift * t / (1.0 + (shift - 1.0) * t) for t in times]


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """x at the last of `times`, from x at the first: x ← x + (t' - t) · velocity(x, t), in the dtype of x.

    One call per substep; the last time is never evaluated.
    """
    for now, then in pairwise(times):
        x = x + (then - now) * velocity(x, now).to(x.dtype)
    return x


class FlowSolver(Protocol):
    """From noise to data. normal(k): N(0, 1) noise like x, for the substep of index k; deterministic solvers ask for none."""

    def __call__(
        self, velocity: Velocity, x: Tensor, substeps: int, shift: float, normal: Callable[[int], Tensor]
    ) -> Tensor:
        """x: the initial noise, fp32 -> data of its shape, fp32."""


def euler_steps(velocity: Velocity, x: Tensor, substeps: int, shift: float, normal: Callable[[int], Tensor]) -> Tensor:
    """`euler` over even, shifted times."""
    return euler(velocity, x, shifted_times(even_times(substeps), shift))


def sde_times(steps: int) -> list[float]:
    """S evenly spaced times from 1 to `SDE_END`, then 0."""
    return [*torch.linspace(1.0, SDE_END, steps, dtype=torch.float64).tolist(), 0.0]


def sde(velocity: Velocity, x: Tensor, substeps: int, shift: float, normal: Callable[[int], Tensor]) -> Tensor:
    """Euler-Maruyama on the reverse SDE that has the flow's marginals (SiT, arXiv 2401.08740, section 2), with w(t) = 2 t (xAR).

    dx = (v - w/2 · score) dt + sqrt(w) dW, where score = (-(1 - t) v - x) / t: the drift is (2 - t) v + x. It is linear in v, so
    guided velocities give the guided drift. The last substep, from `SDE_END` to 0, adds no noise. The state is float64, the
    velocity sees fp32. Raises VgenError below 3 substeps.
    """
    if substeps < 3:
        raise VgenError(f"the solver sde needs at least 3 substeps, got {substeps}; take more, or the solver euler")
    x = x.double()
    for index, (now, then) in enumerate(pairwise(shifted_times(sde_times(substeps), shift))):
        drift = (2.0 - now) * velocity(x.float(), now).double() + x
        x = x + (then - now) * drift
        if then > 0:
            x = x + math.sqrt(2.0 * now * (now - then)) * normal(index)
    return x.float()


FLOW_SOLVERS: dict[str, FlowSolver] = {"euler": euler_steps, "sde": sde}


def flow_solver(name: str) -> FlowSolver:
    """The solver of a name in FLOW_SOLVERS."""
    if name not in FLOW_SOLVERS:
        raise VgenError(f"a flow solver is {' or '.join(FLOW_SOLVERS)}, got {name!r}{nearest(name, FLOW_SOLVERS)}")
    return FLOW_SOLVERS[name]


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


def logit_normal_times(normal: Tensor) -> Tensor:
    """Times in (0, 1) from N(0, 1) draws, fp32: their sigmoids (SD3, arXiv 2403.03206, section 3.1, m = 0 and s = 1)."""
    return normal.sigmoid().float()


def spread_draws(uniform: Tensor) -> Tensor:
    """U(0, 1) draws [B] -> one draw in each of B equal parts of [0, 1): a batch then covers all times evenly."""
    return (torch.arange(len(uniform), device=uniform.device) + uniform) / len(uniform)


# How training draws its times: name -> times from U(0, 1) draws [B] and a scale, which `mode` alone has.
TIMES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mode": mode_times,
    "logit-normal": lambda uniform, scale: logit_normal_times(torch.special.ndtri(uniform)),
    "logit-normal-spread": lambda uniform, scale: logit_normal_times(torch.special.ndtri(spread_draws(uniform))),
}


def noisy(data: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """x_t = t · noise + (1 - t) · data for times [B], or times of the first dimensions of data, such as [B, N]."""
    t = times.view(*times.shape, *(1,) * (data.dim() - times.dim()))
    return t * noise + (1.0 - t) * data
