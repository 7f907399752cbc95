"""Training FlexAR: next-token cross-entropy over FlexTok's tokens, from coarse to fine (arXiv 2502.13967, section 5; `system: flexar`).

A causal model that knows how all tokens follow each other knows it of every number of leading ones, so there is nothing to drop:
pictures of any number of tokens come from one training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vgen.data.tokens import TokenSetSpec
from vgen.models.flexar.blocks import NORMS
from vgen.models.flexar.flexar import SIZES, FlexARModel
from vgen.models.flexar.text import Prompts
from vgen.samplers.types import Condition, grid_size
from vgen.settings import require, require_choice, require_positive
from vgen.train.systems.generator import GeneratorConfig, GeneratorSystem, check_generator, model_options


@dataclass(frozen=True)
class ModelConfig:
    """A named size of FlexARModel; what is set replaces the size's own value. tokens: how many leading tokens are learned (None:
    all that the token set has); text_width: of the features of prompts; norm, qk_norm, post_norm, bias: see `FlexARModel`.
    """

    size: str = "113M"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    hidden: int | None = None
    tokens: int | None = None
    text_width: int | None = None
    norm: str = "layer"
    qk_norm: bool = True
    post_norm: bool = True
    bias: bool = False


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: flexar`."""

    model: ModelConfig = field(default_factory=ModelConfig)


class FlexARSystem(GeneratorSystem):
    """FlexAR by classes, by words, or by prompts through a frozen T5."""

    conditions: ClassVar[Sequence[str]] = ("words", "class", "text")
    captions_kind = Prompts

    @classmethod
    def make_model(cls, config: Config, tokens: TokenSetSpec, conditions: int) -> FlexARModel:
        """See `GeneratorSystem.make_model`."""
        options = model_options(FlexARModel.size_config(config.model.size), config.model)
        options = {"tokens": grid_size(tokens.grid), **options, "codes": tokens.vocabulary}
        condition = config.condition
        if condition.kind != "text":
            options["classes"] = conditions
        return FlexARModel(conditioning=condition.kind, condition_dropout=condition.dropout, **options)

    def _objective(
        self, condition: Condition, batch: Mapping[str, Any], draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Of the leading tokens that the model has."""
        tokens = batch["tokens"][:, : self.model.config.tokens]
        return super()._objective(condition, {**batch, "tokens": tokens}, draws)


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    model = config.model
    require_choice("model.size", model.size, SIZES)
    require_choice("model.norm", model.norm, NORMS)
    sized = ("width", "depth", "heads", "hidden", "text_width")
    require_positive(model, *(name for name in sized if getattr(model, name) is not None), prefix="model.")
    tokens = check_generator(config, FlexARSystem)
    length = grid_size(tokens.grid)
    require(
        tokens.grid == (1, 1, length),
        f"data.tokens: FlexAR learns sequences such as FlexTok's, {config.data.tokens} has the grid {'x'.join(map(str, tokens.grid))}",
    )
    require(
        model.tokens is None or 1 <= model.tokens <= length,
        f"model.tokens must lie in 1..{length}, the tokens a picture has, found {model.tokens}",
    )


missing, sketch = FlexARSystem.missing, FlexARSystem.sketch


def build(config: Config, device: torch.device) -> FlexARSystem:
    """Opens the token sets and makes the model."""
    return FlexARSystem(config, device)
