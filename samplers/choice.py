"""How a token is picked: data, not code, because every family has its own settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vgen.errors import VgenError, nearest
from vgen.samplers.diffusion import TRAIN_STEPS, spaced_timesteps
from vgen.samplers.settings import Sampling
from vgen.samplers.types import Step
from vgen.values import real, string, whole

SCORES = ("log_prob", "logit")


@dataclass(frozen=True)
class Ramp:
    """A setting that moves in a straight line from `start` to `end` over the calls of a run.

    A call gets the value of the share of the calls done *with* it: call i of N that of (i + 1) / N, so the last call gets
    `end` and no call gets `start` (MaskGIT's annealing).
    """

    start: float
    end: float

    def at(self, step: Step) -> float:
        """The value in the call `step`."""
        return self.start + (self.end - self.start) * step.progress


Setting = float | Ramp


@dataclass(frozen=True)
class TokenChoice:
    """Order of operations: guidance, divide by `softmax_temperature`, divide by `temperature`, top-k (ties with the k-th
    kept), top-p (the crossing token kept), then argmax(logits + Gumbel), which is a draw from the softmax.

    temperature 0 is greedy; top_k 0 and top_p 1 are off. Either temperature may be a `Ramp`. The two differ for the score
    only, which is what confidence orders compare: "log_prob" (the log-softmax of the drawn token under both temperatures)
    or "logit" (its guided logit divided by softmax_temperature). MaskGIT adds `temperature` x Gumbel to the logits, which
    is the same draw.
    """

    temperature: Setting = 1.0
    top_k: int = 0
    top_p: float = 1.0
    softmax_temperature: Setting = 1.0
    score: str = "log_prob"

    def __post_init__(self):
        _settle(self, "temperature", lambda t: t >= 0, "temperature must be at least 0 (0: the likeliest token)")
        _settle(self, "softmax_temperature", lambda t: t > 0, "softmax temperature must be above 0")
        object.__setattr__(self, "top_k", whole(self.top_k, "top-k (0: all tokens)"))
        object.__setattr__(self, "top_p", real(self.top_p, "top-p"))
        if not 0 < self.top_p <= 1:
            raise VgenError(f"top-p must be in (0, 1], got {self.top_p}")
        if self.score not in SCORES:
            raise VgenError(f"the score is one of {', '.join(SCORES)}, got {self.score!r}")

    @classmethod
    def of(cls, settings: Sampling) -> TokenChoice:
        """The recipe at the temperature, with the filters. Raises VgenError for substeps: a code is drawn at once."""
        if (settings.substeps, settings.solver, settings.clip) != (None,) * 3 or settings.shift != 1.0:
            raise VgenError(
                "this model draws codes, at once; leave out substeps, solver, shift and clip, they are for continuous tokens"
            )
        return token_choice(settings.choice, settings.temperature, settings.top_k, settings.top_p)

    def at(self, step: Step) -> TokenChoice:
        """The settings of one call, ramps replaced by their values."""
        return replace(
            self, temperature=_at(self.temperature, step), softmax_temperature=_at(self.softmax_temperature, step)
        )


# Named recipes: what the one temperature that users set means in a family's sampler.
RECIPES: dict[str, Callable[[float], dict[str, Any]]] = {
    "plain": lambda temperature: {"temperature": temperature},
    # MaskGIT as in its published figures, and MaskGen-VQ: noise that falls to 0, logits that sharpen, the logit as confidence.
    "maskgit": lambda temperature: {
        "temperature": Ramp(temperature, 0.0),
        "softmax_temperature": Ramp(1.3, 0.5),
        "score": "logit",
    },
    # MaskGIT as in its demo: the logits stay as they are.
    "maskgit-demo": lambda temperature: {"temperature": Ramp(temperature, 0.0), "score": "logit"},
}


def token_choice(recipe: str, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> TokenChoice:
    """The settings of a named recipe (`RECIPES`) at a temperature. Raises VgenError for an unknown name."""
    if string(recipe, "the recipe of choices") not in RECIPES:
        raise VgenError(f"unknown recipe of choices {recipe!r}{nearest(recipe, RECIPES)}; known: {', '.join(RECIPES)}")
    return TokenChoice(top_k=top_k, top_p=top_p, **RECIPES[recipe](temperature))


@dataclass(frozen=True)
class DiffusionChoice:
    """How a continuous token is denoised (`vgen.samplers.diffusion`).

    temperature: factor of the noise that is added in every substep (not of the initial noise). substeps: which of the
    training's timesteps are used, as in `GaussianDiffusion.respaced` ("100", "ddim50", …). solver: a name of `SOLVERS`.
    clip: bound of the estimated tokens in every substep, in standard deviations of the latents. None: no bound, as MAR,
    MaskGen-KL and Hi-MAR were published; small networks need one (5 or so), or their errors at the noisy end blow up.
    """

    temperature: float = 1.0
    substeps: str = "100"
    solver: str = "ancestral"
    clip: float | None = None

    def __post_init__(self):
        _settle(self, "temperature", lambda t: t >= 0, "temperature of the diffusion noise must be at least 0")
        if self.clip is not None:
            _settle(
                self, "clip", lambda bound: bound > 0, "bound of estimated tokens (clip) must be above 0, such as 5"
            )

    @classmethod
    def of(cls, settings: Sampling) -> DiffusionChoice:
        """Temperature, spacing, solver and bound."""
        settings.check_continuous()
        if settings.shift != 1.0:
            raise VgenError("this model denoises by diffusion; a time shift is for flows, leave it out")
        substeps = settings.substeps
        if substeps is not None and not isinstance(substeps, str):
            substeps = str(whole(substeps, "the number of substeps", 1, TRAIN_STEPS))
        if substeps is not None:
            spaced_timesteps(substeps)  # says what is wrong with it before anything is made
        given = {"substeps": substeps, "solver": settings.solver, "clip": settings.clip}
        return cls(settings.temperature, **{name: value for name, value in given.items() if value is not None})

    def at(self, step: Step) -> DiffusionChoice:
        """The settings of one call: always the same."""
        return self


@dataclass(frozen=True)
class FlowChoice:
    """How a continuous token is made by a flow (`vgen.samplers.flow`).

    temperature: factor of the initial noise; substeps: calls of the velocity; solver: a name of `FLOW_SOLVERS`; shift: above 1
    spends more substeps near the noise (`shifted_times`; 1: even ones).
    """

    temperature: float = 1.0
    substeps: int = 50
    solver: str = "euler"
    shift: float = 1.0

    def __post_init__(self):
        _settle(self, "temperature", lambda t: t >= 0, "temperature of the initial noise must be at least 0")
        _settle(self, "shift", lambda a: a > 0, "time shift must be above 0 (1: none)")
        object.__setattr__(self, "substeps", whole(self.substeps, "the number of substeps of a flow", 1))

    @classmethod
    def of(cls, settings: Sampling) -> FlowChoice:
        """Temperature, number of substeps, solver and shift."""
        settings.check_continuous()
        if settings.clip is not None:
            raise VgenError("this model follows a flow; a bound (clip) is for diffusion, leave it out")
        if settings.low_substeps is not None:
            raise VgenError("this model has the same number of substeps for all tokens; leave out low_substeps")
        given = {"substeps": settings.substeps, "solver": settings.solver}
        return cls(
            settings.temperature,
            shift=settings.shift,
            **{name: value for name, value in given.items() if value is not None},
        )


@dataclass(frozen=True)
class PhaseChoice:
    """Settings of its own for every phase, the last ones for later phases (Hi-MAR: 100 substeps, then 250)."""

    phases: tuple[TokenChoice | DiffusionChoice, ...]

    def at(self, step: Step) -> TokenChoice | DiffusionChoice:
        """The settings of one call."""
        return self.phases[min(step.phase, len(self.phases) - 1)].at(step)


def _at(setting: Setting, step: Step) -> float:
    return setting.at(step) if isinstance(setting, Ramp) else setting


def _settle(choice: Any, field: str, fits: Callable[[float], bool], what: str) -> None:
    """Makes a setting of a new choice plain floats, whatever kind of number it was. VgenError unless they are finite and fit."""
    setting = getattr(choice, field)
    bounds = (setting.start, setting.end) if isinstance(setting, Ramp) else (setting,)
    values = [real(value, f"the {what.partition(' must')[0]}") for value in bounds]
    for value in values:
        if not fits(value):
            raise VgenError(f"the {what}, got {value:g}")
    object.__setattr__(choice, field, Ramp(*values) if isinstance(setting, Ramp) else values[0])
