"""Classifier-free guidance: which rows a batch is tiled to, how they are weighted, how they are mixed.

The mixed prediction is a weighted sum of the rows in fp32: u + s (c - u) has the weights (s, 1 - s). Schedules map a step
(how many positions are known before and after it, or its number) to its scale; every published family has its own, so a
schedule is a function and the table below names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vgen.errors import VgenError, nearest
from vgen.samplers.flow import weighted_sum
from vgen.samplers.types import Guidance, Step
from vgen.values import real, string

# (step, power) -> share of the way from `start` to `scale`
Schedule = Callable[[Step, float], float]


def _known(step: Step, count: int) -> float:
    """Share of the positions that is known when `count` are not."""
    return 1.0 - count / max(step.start_unknown, 1)


def _raised_cosine(share: float) -> float:
    """From 0 to 1 along half a cosine."""
    return 0.5 * (1.0 - math.cos(math.pi * share))


SCHEDULES: dict[str, Schedule] = {
    "constant": lambda step, power: 1.0,
    "linear": lambda step, power: _known(step, step.unknown[1]),  # ARPG: counts the tokens decoded including this step
    # MAR, Hi-MAR, MaskGen-KL: one token always counts as unknown, so the last step gets (L - 1) / L, not 1.
    "linear-clamped": lambda step, power: _known(step, max(step.unknown[1], 1)),
    "linear-before": lambda step, power: _known(step, step.unknown[0]),  # RandAR: the first pass is unguided
    "cosine": lambda step, power: _raised_cosine(_known(step, step.unknown[1])),
    # MDT, RAR, DAR: every checkpoint has its own power; power 0 is constant, because 0 ** 0 = 1.
    "power-cosine": lambda step, power: _raised_cosine(_known(step, step.unknown[0]) ** power),
    # The samplers of MaskGIT and MaskGen-VQ count steps, however many tokens these decode.
    "step-linear-before": lambda step, power: step.index / step.total,
    "step-power-cosine": lambda step, power: _raised_cosine((step.index / step.total) ** power),
    "step-linear": lambda step, power: step.progress,
    # xAR: from the first call, which is not guided, to the last one, which is fully; a single call is fully guided.
    "step-linear-ends": lambda step, power: step.index / (step.total - 1) if step.total > 1 else 1.0,
    "step-cosine": lambda step, power: _raised_cosine(step.progress**power),
    # From 1/2 down to -1/2 (not from 1 to 0), as released.
    "step-flipped-cosine": lambda step, power: 0.5 * math.cos(math.pi * step.progress**power),
}


@dataclass(frozen=True)
class ClassifierFree:
    """cond and null rows, mixed as u + s (c - u) with s running from `start` to `scale` by `schedule` (a name in SCHEDULES).

    scale 1 means no guidance: one row, half the work. start: 1 but for MaskGen-VQ, which mixes as c + s (c - u) with its
    own s from 1 on, so that it begins at 2. power: exponent of "power-cosine" and of the cosines that count steps, at
    least 0; the other schedules do not read it. limits: per phase (the last one for later phases), how many positions may have been decoded in the
    phase before a step that is still guided; None: any number. The null row is run all the same, as in the released
    samplers whose `cfg_interval` this is. Source: arXiv 2207.12598, equation 6 (s = 1 + w).
    """

    scale: float = 1.0
    schedule: str = "constant"
    power: float = 1.5
    limits: tuple[int | None, ...] = ()
    start: float = 1.0

    def __post_init__(self):
        if string(self.schedule, "the guidance schedule") not in SCHEDULES:
            raise VgenError(
                f"unknown guidance schedule {self.schedule!r}{nearest(self.schedule, SCHEDULES)}; known: {', '.join(SCHEDULES)}"
            )
        for name in ("scale", "power", "start"):
            object.__setattr__(self, name, real(getattr(self, name), f"the guidance {name}", 0))

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the conditions a model must run."""
        return ("cond",) if self.scale == self.start == 1 else ("cond", "null")

    def weights(self, step: Step) -> tuple[float, ...]:
        """(s, 1 - s) of this step, (1, 0) beyond the limit of its phase, or (1,)."""
        if len(self.rows) == 1:
            return (1.0,)
        limit = self.limits[min(step.phase, len(self.limits) - 1)] if self.limits else None
        if limit is not None and step.start_unknown - step.unknown[0] > limit:
            return (1.0, 0.0)
        scale = self.start + (self.scale - self.start) * SCHEDULES[self.schedule](step, self.power)
        return (scale, 1.0 - scale)

    def mix(self, parts: Tensor, weights: Sequence[float]) -> Tensor:
        """Weighted sum of [R, ...] in fp32. The weights stay on the host: copying them in every substep would wait for the device."""
        return weighted_sum(parts, weights)


@dataclass(frozen=True)
class PhaseGuidance:
    """A guidance of its own for every phase, the last one for later phases (Hi-MAR: `re_cfg`, then `cfg`).

    Its rows are those of the phase that has most. Where a phase has fewer, the others weigh 0.
    """

    phases: tuple[ClassifierFree, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the conditions a model must run."""
        return max((phase.rows for phase in self.phases), key=len)

    def weights(self, step: Step) -> tuple[float, ...]:
        """Those of the step's phase, and zeros."""
        weights = self.phases[min(step.phase, len(self.phases) - 1)].weights(step)
        return weights + (0.0,) * (len(self.rows) - len(weights))

    def mix(self, parts: Tensor, weights: Sequence[float]) -> Tensor:
        """Weighted sum of [R, ...] in fp32."""
        return self.phases[0].mix(parts, weights)


@dataclass(frozen=True)
class TextImageGuidance:
    """Guidance by a text and by a picture that is kept: n + image (i - n) + text (c - i) for the rows cond, null and image (a
    condition without its text). Source: InstructPix2Pix, arXiv 2211.09800, equation 3.

    text, image: scales of at least 1. image_row: False without an input picture: n + text (c - n). renorm: what is mixed gets at most the
    conditional row's norm over the channels (the "channel" renorm of Ming-UniVision).
    """

    text: float = 3.0
    image: float = 1.1
    image_row: bool = False
    renorm: bool = False

    def __post_init__(self):
        for name, scale in (("text", self.text), ("image", self.image)):
            object.__setattr__(self, name, real(scale, f"the {name} guidance (1: none)", 1))

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the conditions a model must run."""
        if self.text == 1 and (self.image == 1 or not self.image_row):
            return ("cond",)
        return ("cond", "null", "image") if self.image_row else ("cond", "null")

    def weights(self, step: Step) -> tuple[float, ...]:
        """One weight per row, the same in every step."""
        if self.rows == ("cond",):
            return (1.0,)
        if not self.image_row:
            return (self.text, 1.0 - self.text)
        return (self.text, 1.0 - self.image, self.image - self.text)

    def mix(self, parts: Tensor, weights: Sequence[float]) -> Tensor:
        """Weighted sum of [R, ..., C] in fp32, shortened where `renorm` says so."""
        mixed = weighted_sum(parts, weights)
        if not self.renorm:
            return mixed
        length, limit = (x.norm(dim=-1, keepdim=True) for x in (mixed, parts[0].float()))
        return mixed * (limit / length + 1e-8).clamp(max=1.0)


def is_weighted_sum(guidance: Guidance) -> bool:
    """Whether `mix` is the plain weighted sum, which kernels compute on the way: not for a guidance with a `mix` of its own."""
    if isinstance(guidance, PhaseGuidance):
        return type(guidance).mix is PhaseGuidance.mix and is_weighted_sum(guidance.phases[0])
    return getattr(type(guidance), "mix", None) is ClassifierFree.mix
