"""Training DAR: next-token cross-entropy along the zig-zag, over the tokenizer's frozen codebook (arXiv 2503.11129; `system: dar`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from vgen.data.tokens import TokenSetSpec
from vgen.models.dar.dar import DARModel
from vgen.settings import require, require_share
from vgen.tokenizers_vis.registry import SHIPPED, find_tokenizer, saved_class
from vgen.train.systems.generator import DataConfig, GeneratorConfig, GeneratorSystem, check_generator, model_options


@dataclass(frozen=True)
class ModelConfig:
    """A named size of `vgen.models.dar.dar.SIZES`; a number that is set replaces that of the size. first: right or down."""

    size: str = "B"
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    hidden: int | None = None
    first: str = "right"
    dropout: float = 0.1
    attention_dropout: float = 0.1


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: dar`; `data.tokenizer` is needed, because its code vectors are the model's token embeddings."""

    model: ModelConfig = field(default_factory=ModelConfig)


class DARSystem(GeneratorSystem):
    """DAR."""

    @classmethod
    def make_model(cls, config: Config, tokens: TokenSetSpec, conditions: int) -> DARModel:
        """See `GeneratorSystem.make_model`."""
        options: dict[str, Any] = model_options(DARModel.size_config(config.model.size), config.model)
        return DARModel(
            codes=tokens.vocabulary,
            code_channels=_code_channels(config.data),
            grid=tokens.grid,
            conditioning=config.condition.kind,
            classes=conditions,
            condition_dropout=config.condition.dropout,
            **options,
        )

    def prepare(self, model: ModelMixin) -> None:
        """Takes over the code vectors (normalised, where the tokenizer decodes normalised ones)."""
        codes = torch.arange(model.config.codes, device=self.device)
        model.load_codebook(self.tokenizer.code_vectors(codes[None])[0].cpu())


def _code_channels(data: DataConfig) -> int:
    """Width of the tokenizer's code vectors, from its config: the weights are not needed for that. Not there yet: of `data.shape`."""
    if data.tokenizer not in SHIPPED and not Path(data.tokenizer).exists():
        return data.shape.code_channels
    folder = find_tokenizer(data.tokenizer)
    kind = saved_class(folder)
    with torch.device("meta"):
        tokenizer = kind.from_config(kind.load_config(folder))
        return tokenizer.code_vectors(torch.zeros(1, 1, dtype=torch.long)).shape[-1]


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    require_share(config.model, "dropout", "attention_dropout", prefix="model.", below_one=True)
    require(
        config.data.tokenizer is not None, "data.tokenizer must name the tokenizer: DAR embeds tokens by its codebook"
    )
    check_generator(config, DARSystem)


missing, sketch = DARSystem.missing, DARSystem.sketch


def build(config: Config, device: torch.device) -> DARSystem:
    """Opens the token sets and makes the model."""
    return DARSystem(config, device)
