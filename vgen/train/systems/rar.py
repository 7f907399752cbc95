"""Training RAR: random orders that anneal to raster (arXiv 2411.00776, section 3.2; `system: rar`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from vgen.data.tokens import TokenSetSpec
from vgen.models.rar.rar import RARModel, draw_orders, random_share
from vgen.samplers.types import grid_size
from vgen.settings import require_share
from vgen.train.systems.generator import GeneratorConfig, GeneratorSystem, check_generator, model_options


@dataclass(frozen=True)
class ModelConfig:
    """A named size of `vgen.models.rar.rar.SIZES`; a number that is set replaces that of the size."""

    size: str = "B"
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    hidden: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.1


@dataclass(frozen=True)
class AnnealingConfig:
    """Shares of the training: all orders are random until `start`, all raster from `end` on."""

    start: float = 0.5
    end: float = 0.75


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: rar`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    annealing: AnnealingConfig = field(default_factory=AnnealingConfig)


class RARSystem(GeneratorSystem):
    """RAR."""

    @classmethod
    def make_model(cls, config: Config, tokens: TokenSetSpec, conditions: int) -> RARModel:
        """See `GeneratorSystem.make_model`."""
        return RARModel(
            codes=tokens.vocabulary,
            grid=tokens.grid,
            conditioning=config.condition.kind,
            classes=conditions,
            condition_dropout=config.condition.dropout,
            **model_options(RARModel.size_config(config.model.size), config.model),
        )

    def draws(self, batch: int, progress: float | None, generator: Generator) -> dict[str, Tensor]:
        """Orders [B, N]; evaluation is in raster order, in which training ends."""
        annealing = self.config.annealing
        share = 0.0 if progress is None else random_share(progress, annealing.start, annealing.end)
        return {"orders": draw_orders(batch, grid_size(self.train_tokens.grid), share, generator)}


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    require_share(config.model, "dropout", "attention_dropout", prefix="model.", below_one=True)
    random_share(0.0, config.annealing.start, config.annealing.end)  # raises for shares out of order
    check_generator(config, RARSystem)


missing, sketch = RARSystem.missing, RARSystem.sketch


def build(config: Config, device: torch.device) -> RARSystem:
    """Opens the token sets and makes the model."""
    return RARSystem(config, device)
