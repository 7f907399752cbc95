"""Gaussian diffusion of single tokens: the process, its respacing, and solvers over substeps (MAR, Hi-MAR, MaskGen-KL).

Ho et al., arXiv 2006.11239 (DDPM), with the cosine schedule and the learned variance of Nichol and Dhariwal, arXiv
2102.09672. The training losses are in diffusion_loss.py.

diffusers' schedulers are not used because they do not give these numbers. Their tables are fp32 products where the
released code has fp64 tables that are cast when they are read; their timestep spacings pick other timesteps than the
respacing here; they take the variance of a respaced step from neighbours of the *unspaced* process where the released
code makes new betas of the retained steps; and none has a temperature on the noise of a step.

Shapes: n rows (tokens), C channels, T timesteps of a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from vgen.errors import VgenError, nearest

TRAIN_STEPS = 1000


def cosine_betas(steps: int = TRAIN_STEPS) -> list[float]:
    """arXiv 2102.09672, equation 17: beta_i = 1 - abar((i + 1) / T) / abar(i / T), at most 0.999."""

    def alpha_bar(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]


def linear_betas(steps: int = TRAIN_STEPS) -> list[float]:
    """arXiv 2006.11239, section 4: from 1e-4 to 0.02 at 1000 steps, scaled so that other counts destroy as much."""
    low, high = 1e-4 * 1000 / steps, 0.02 * 1000 / steps
    return torch.linspace(low, high, steps, dtype=torch.float64, device="cpu").tolist()


BETAS: dict[str, Callable[[int], list[float]]] = {"cosine": cosine_betas, "linear": linear_betas}


class GaussianDiffusion:
    """The process q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t) and its posteriors q(x_{t-1} | x_t, x_0), as tables.

    betas: T noise variances; timesteps: T numbers that the network is told (those of the training process, also after
    respacing); clip: estimates of x_0 are kept within ± clip. `tables` holds fp64 CPU tensors [T] (arXiv 2006.11239, equations 4 to 7, in the names of the papers).
    """

    def __init__(self, betas: Sequence[float], timesteps: Sequence[int] | None = None, clip: float | None = None):
        self.clip = clip
        self.timesteps = list(range(len(betas)) if timesteps is None else timesteps)
        beta = torch.tensor(betas, dtype=torch.float64, device="cpu")  # also when the model is built on the meta device
        alpha, alpha_bar = 1 - beta, torch.cumprod(1 - beta, dim=0)
        before = torch.cat((torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]))
        variance = beta * (1 - before) / (1 - alpha_bar)
        # The first posterior variance is 0: its logarithm, and "fixed large" (beta but there), take the second entry.
        second = variance[1:2] if len(beta) > 1 else beta[:1]
        self.tables = {
            "beta": beta,
            "log_beta": beta.log(),
            "alpha_bar": alpha_bar,
            "alpha_bar_before": before,
            "signal": alpha_bar.sqrt(),
            "noise": (1 - alpha_bar).sqrt(),
            "x0_of_x": (1 / alpha_bar).sqrt(),
            "x0_of_noise": (1 / alpha_bar - 1).sqrt(),
            "posterior_x0": beta * before.sqrt() / (1 - alpha_bar),
            "posterior_x": (1 - before) * alpha.sqrt() / (1 - alpha_bar),
            "posterior_variance": variance,
            "posterior_log_variance": torch.cat((second, variance[1:])).log(),
            "fixed_large_variance": torch.cat((second, beta[1:])),
            "fixed_large_log_variance": torch.cat((second, beta[1:])).log(),
        }
        self._casts: dict[torch.device, dict[str, Tensor]] = {}
        self._respaced: dict[tuple[str, float | None], GaussianDiffusion] = {}

    @classmethod
    def named(cls, schedule: str = "cosine", steps: int = TRAIN_STEPS) -> GaussianDiffusion:
        """The training process of a noise schedule of BETAS."""
        if schedule not in BETAS:
            raise VgenError(
                f"a noise schedule is {' or '.join(BETAS)}, got {schedule!r}{nearest(schedule, BETAS)}; choose one of them"
            )
        return cls(BETAS[schedule](steps))

    def __len__(self) -> int:
        return len(self.timesteps)

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The tables in fp32 on a device, copied there once."""
        if device not in self._casts:
            self._casts[device] = {name: table.to(device, torch.float32) for name, table in self.tables.items()}
        return self._casts[device]

    def respaced(self, spacing: str, clip: float | None = None) -> GaussianDiffusion:
        """The process over some of the timesteps, named as in `spaced_timesteps` ('': all of them), that clips x_0 at ± clip."""
        key = (spacing or str(len(self)), clip)
        if not spacing and clip is None:
            return self
        if key not in self._respaced:
            spacing = key[0]
            kept = spaced_timesteps(spacing, len(self))
            alpha_bar = self.tables["alpha_bar"][kept]
            before = torch.cat((torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]))
            betas = (1 - alpha_bar / before).tolist()
            self._respaced[key] = GaussianDiffusion(betas, [self.timesteps[i] for i in kept], clip)
        return self._respaced[key]

    def noised(self, x0: Tensor, index: int | Tensor, noise: Tensor) -> Tensor:
        """A draw of q(x_t | x_0): x0, noise [n, ...], index [n] int64, or one for all -> [n, ...]."""
        table = self.on(x0.device)
        if isinstance(index, Tensor):
            index = index.view(-1, *(1,) * (x0.dim() - 1))
        return table["signal"][index] * x0 + table["noise"][index] * noise

    def clean(self, x: Tensor, index: int | Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_t [n, C] and the noise in it. index: int, or [n, 1]. Not clipped unless the process says so.

        At the noisy end x_0 is a difference of large numbers, 20,000 times as wrong as the noise: small networks need `clip`.
        """
        table = self.on(x.device)
        x0 = table["x0_of_x"][index] * x - table["x0_of_noise"][index] * noise
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def posterior_mean(self, x0: Tensor, x: Tensor, index: int | Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) [n, C]. index: int, or [n, 1]."""
        table = self.on(x.device)
        return table["posterior_x0"][index] * x0 + table["posterior_x"][index] * x

    def log_variance(self, spread: Tensor | None, index: int | Tensor, device: torch.device) -> Tensor:
        """Log-variance of the model's step: between the posterior's and log beta by `spread` in [-1, 1] (not clamped).

        arXiv 2102.09672, equation 15. spread None: the fixed upper choice of arXiv 2006.11239 (Hi-MAR's second head).
        """
        table = self.on(device)
        if spread is None:
            return table["fixed_large_log_variance"][index]
        share = (spread + 1) / 2
        return share * table["log_beta"][index] + (1 - share) * table["posterior_log_variance"][index]


def spaced_timesteps(spacing: str, steps: int = TRAIN_STEPS) -> list[int]:
    """Timesteps that a respaced process keeps, ascending.

    'n': n timesteps from 0 to steps - 1, evenly; 'a,b,c': the process is cut into equal sections with a, b and c timesteps;
    'ddimn': every k-th timestep from 0, for the first whole k that gives n. Raises VgenError for what does not fit.
    """
    try:
        if spacing.startswith("ddim"):
            count = int(spacing.removeprefix("ddim"))
            return next(list(range(0, steps, k)) for k in range(1, steps + 1) if len(range(0, steps, k)) == count)
        counts = [int(part) for part in spacing.split(",")]
    except (ValueError, StopIteration) as error:
        raise VgenError(
            f"the substeps of a diffusion are a count such as '100', counts of sections such as '3,2,1', or 'ddim' and a count "
            f"that a whole stride over {steps} timesteps gives, such as 'ddim50'; got {spacing!r}"
        ) from error
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if not 1 <= count <= size:
            what = "a diffusion" if len(counts) == 1 else "a section"
            raise VgenError(f"{what} of {size} timesteps can take 1 to {size} substeps, got {count} in {spacing!r}")
        stride = 1.0 if count == 1 else (size - 1) / (count - 1)
        place = 0.0
        for _ in range(count):
            kept.append(start + round(place))  # half to even, of a running sum: the released rounding
            place += stride
        start += size
    return kept


# ---- solvers ---------------------------------------------------------------------------------------------------------

# (x_t [n, C], timesteps [n]) -> noise [n, C], and where its variance lies in its range [n, C] (None: fixed)
Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
Given = Callable[[Tensor, int], Tensor]  # (x, index of the substep) -> x


class Solver(Protocol):
    """From noise to tokens. normal(k): N(0, 1) noise like x for the substep of index k of the process.

    given(x, k): puts what is known already (at the noise level of k) into x, before every substep; its place in the result
    means nothing.
    """

    def __call__(
        self,
        denoise: Denoise,
        process: GaussianDiffusion,
        x: Tensor,
        normal: Callable[[int], Tensor],
        temperature: float,
        given: Given | None = None,
    ) -> Tensor:
        """x: N(0, 1) [n, C] (or [n, L, C]), fp32 -> tokens of its shape."""


def ancestral(
    denoise: Denoise,
    process: GaussianDiffusion,
    x: Tensor,
    normal: Callable[[int], Tensor],
    temperature: float = 1.0,
    given: Given | None = None,
) -> Tensor:
    """arXiv 2006.11239, algorithm 2. temperature: factor of the noise of every substep; the last one (k = 0) adds none."""
    for k in reversed(range(len(process))):
        x = x if given is None else given(x, k)
        noise, spread = denoise(x, _timesteps(process, k, x))
        mean = process.posterior_mean(process.clean(x, k, noise), x, k)
        if k == 0:
            return mean
        x = mean + (0.5 * process.log_variance(spread, k, x.device)).exp() * normal(k) * temperature
    return x


def ddim(
    denoise: Denoise,
    process: GaussianDiffusion,
    x: Tensor,
    normal: Callable[[int], Tensor],
    temperature: float = 1.0,
    given: Given | None = None,
) -> Tensor:
    """Deterministic: arXiv 2010.02502, equation 12 with sigma 0. `normal` and `temperature` have no effect."""
    table = process.on(x.device)
    for k in reversed(range(len(process))):
        x = x if given is None else given(x, k)
        noise, _ = denoise(x, _timesteps(process, k, x))
        before = table["alpha_bar_before"][k]
        x = before.sqrt() * process.clean(x, k, noise) + (1 - before).sqrt() * noise
    return x


SOLVERS: dict[str, Solver] = {"ancestral": ancestral, "ddim": ddim}


def solver(name: str) -> Solver:
    """The solver of a name in SOLVERS."""
    if name not in SOLVERS:
        raise VgenError(f"a diffusion solver is {' or '.join(SOLVERS)}, got {name!r}{nearest(name, SOLVERS)}")
    return SOLVERS[name]


def _timesteps(process: GaussianDiffusion, k: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), process.timesteps[k], dtype=torch.long, device=x.device)
