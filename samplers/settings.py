"""What users set about sampling: names, defaults, ranges and help, once. Nothing here imports torch.

The pipeline's constructor takes these and keeps them as the defaults of a call (`model_index.json`); published presets and
trainings are the same settings with other defaults; the command line makes its options of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Self, TypeVar

from vgen.errors import VgenError

Init = TypeVar("Init", bound=Callable[..., None])


def setting(
    default: Any,
    help: str,
    metavar: str = "N",
    least: float | None = None,
    most: float | None = None,
    above: bool = False,
) -> Any:
    """A field of `Sampling`. least, most: bounds of a number that is set; above: `least` itself is not allowed; help: a phrase."""
    described = {"help": help, "metavar": metavar, "least": least, "most": most, "above": above}
    return field(default=default, metadata=described)


@dataclass(frozen=True)
class Sampling:
    """The settings of a pipeline, whatever its model: each kind of choice takes what it knows (`of`) and refuses the rest.

    None: what the model, or its kind of token, has as its own.
    """

    order: str | None = setting("random", "decode order, e.g. raster, neighbor, regions-4, zip-3, locality", "ORDER")
    steps: int | None = setting(None, "forward passes, for orders whose number of steps is free", least=1)
    guidance_scale: float = setting(3.0, "classifier-free guidance; 1 is none", "S", least=0)
    guidance_schedule: str = setting(
        "constant",
        "how the guidance grows: constant, by what is known (linear, linear-clamped, linear-before, cosine, power-cosine) or by "
        "the number of the step (step-linear, step-linear-before, step-linear-ends, step-cosine, step-power-cosine, step-flipped-cosine)",
        "NAME",
    )
    guidance_power: float = setting(1.5, "exponent of the cosine schedules of guidance", "P", least=0)
    guidance_start: float = setting(1.0, "where schedules of guidance begin", "S", least=0)
    choice: str = setting("plain", "recipe of `samplers.choice.RECIPES`: what the temperature means", "NAME")
    temperature: float = setting(1.0, "0 always takes the likeliest token", "T", least=0)
    top_k: int = setting(0, "keep the K likeliest tokens; 0: all", "K", least=0)
    top_p: float = setting(
        1.0, "keep the likeliest tokens up to probability P; 1: all", "P", least=0, most=1, above=True
    )
    substeps: int | str | None = setting(
        None, "continuous tokens: steps of the diffusion (100, ddim50, …) or of the flow (50) behind every token"
    )
    solver: str | None = setting(None, "of continuous tokens: a name of `SOLVERS` or `FLOW_SOLVERS`", "NAME")
    shift: float = setting(1.0, "of flow times: above 1 spends more substeps near the noise", "A", least=0, above=True)
    clip: float | None = setting(
        None, "bound of the estimated tokens in every substep of a diffusion", "C", least=0, above=True
    )
    # of models that make a small picture first (Hi-MAR)
    low_steps: int | None = setting(None, "--steps of the small picture that Hi-MAR makes first", least=1)
    low_guidance_scale: float | None = setting(None, "--guidance-scale of that small picture", "S", least=0)
    low_substeps: int | str | None = setting(None, "--substeps of that small picture")
    size: list[int] | None = field(
        default=None, metadata={"help": "(height, width) of pictures whose tokens leave it open", "metavar": "HxW"}
    )

    @classmethod
    def named(cls, name: str) -> Field[Any]:
        """The field of a setting."""
        return next(part for part in fields(cls) if part.name == name)

    def given(self, **changes: Any) -> Self:
        """These settings with those of `changes` that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def check_ranges(self, prefix: str = "") -> None:
        """Raises VgenError for a number outside of its range. prefix: of the name in the message."""
        for part in fields(self):
            value, (least, most, above) = getattr(self, part.name), bounds(part)
            if value is not None and least is not None and (value < least or (above and value == least)):
                raise VgenError(
                    f"{prefix}{part.name} must be {'above' if above else 'at least'} {least:g}, found {value}"
                )
            if value is not None and most is not None and value > most:
                raise VgenError(f"{prefix}{part.name} must be at most {most:g}, found {value}")

    def check_continuous(self) -> None:
        """Raises VgenError for filters of codes."""
        if self.top_k or self.top_p != 1.0:
            raise VgenError("this model makes continuous tokens, which have no top-k or top-p; leave them out")


def bounds(part: Field[Any]) -> tuple[float | None, float | None, bool]:
    """(least, most, whether `least` itself is excluded) of a field; a preset may have fields without bounds."""
    return part.metadata.get("least"), part.metadata.get("most"), part.metadata.get("above", False)


def takes_sampling(init: Init) -> Init:
    """Makes a constructor (self, tokenizer, model, *values, **settings) show every field of `Sampling` by its name, as diffusers reads it."""
    import inspect

    own = [part for part in inspect.signature(init).parameters.values() if part.kind is part.POSITIONAL_OR_KEYWORD]
    named = [
        inspect.Parameter(
            part.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=part.default, annotation=part.type
        )
        for part in fields(Sampling)
    ]
    init.__signature__ = inspect.Signature([*own, *named])
    init.__annotations__ = {part.name: part.annotation for part in (*own[1:], *named)}
    return init
