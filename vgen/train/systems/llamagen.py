"""Training LlamaGen: next-token cross-entropy in raster order (arXiv 2406.06525, section 2.2; `system: llamagen`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vgen.data.tokens import TokenSetSpec
from vgen.models.llama.backbone import LlamaBackbone
from vgen.models.llama.llamagen import LlamaGenModel
from vgen.settings import require_share
from vgen.train.systems.generator import GeneratorConfig, GeneratorSystem, check_generator, model_options

DROPOUTS = ("token_dropout", "residual_dropout", "ffn_dropout", "attention_dropout")


@dataclass(frozen=True)
class ModelConfig:
    """A named size of `vgen.models.llama.backbone.SIZES`; a number that is set replaces that of the size."""

    size: str = "B"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    hidden: int | None = None
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    ffn_dropout: float = 0.1
    attention_dropout: float = 0.0


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: llamagen`."""

    model: ModelConfig = field(default_factory=ModelConfig)


class LlamaSystem(GeneratorSystem):
    """What LlamaGen, PAR and NAR share: constructor arguments."""

    model_class: ClassVar[type[LlamaBackbone]]

    @classmethod
    def make_model(cls, config: Any, tokens: TokenSetSpec, conditions: int) -> LlamaBackbone:
        """See `GeneratorSystem.make_model`."""
        options = model_options(cls.model_class.size_config(config.model.size), config.model)
        if config.condition.kind != "text":
            options["classes"] = conditions
        options |= {"codes": tokens.vocabulary, "grid": tokens.grid}  # a PAR size has the grid of its published file
        condition = config.condition
        return cls.model_class(conditioning=condition.kind, condition_dropout=condition.dropout, **options)


class LlamaGenSystem(LlamaSystem):
    """LlamaGen; ZipAR samples from what it trains."""

    model_class = LlamaGenModel
    conditions: ClassVar[Sequence[str]] = ("words", "class", "text")


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    require_share(config.model, *DROPOUTS, prefix="model.", below_one=True)
    check_generator(config, LlamaGenSystem)


missing, sketch = LlamaGenSystem.missing, LlamaGenSystem.sketch


def build(config: Config, device: torch.device) -> LlamaGenSystem:
    """Opens the token sets and makes the model."""
    return LlamaGenSystem(config, device)
