"""Training the native any-order generator: cross-entropy over random and named decode orders (`system: anyorder`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor

from vgen.data.tokens import TokenSetSpec
from vgen.models.anyorder import AnyOrderModel, size_config
from vgen.samplers.mixture import OrderMixture
from vgen.samplers.types import Condition, Grid
from vgen.settings import require, require_positive, require_share
from vgen.train.systems.generator import GeneratorConfig, GeneratorSystem, check_generator, model_options


@dataclass(frozen=True)
class ModelConfig:
    """A named size of `vgen.models.anyorder.SIZES`; a number that is set replaces that of the size."""

    size: str = "XS"
    width: int | None = None
    content_layers: int | None = None
    query_layers: int | None = None
    heads: int | None = None
    hidden: int | None = None
    dropout: float = 0.1
    prefix_limit: int = 16  # longest prefix in tokens; longer captions are cut


@dataclass(frozen=True)
class OrdersConfig:
    """Which decode orders training sees (`vgen.samplers.mixture.OrderMixture`)."""

    named: list[str] = field(default_factory=lambda: ["raster", "diagonal", "neighbor", "locality"])
    random_share: float = 0.5
    steps: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    merge_share: float = 0.1


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: anyorder`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    orders: OrdersConfig = field(default_factory=OrdersConfig)


class AnyOrderSystem(GeneratorSystem):
    """The native model, over a mixture of orders that a run draws from anew in every step."""

    conditions: ClassVar[Sequence[str]] = ("words",)

    def __init__(self, config: Config, device: torch.device):
        super().__init__(config, device)
        self.mixture = mixture(config, self.train_tokens.grid)

    @classmethod
    def make_model(cls, config: Config, tokens: TokenSetSpec, conditions: int) -> AnyOrderModel:
        """See `GeneratorSystem.make_model`."""
        return AnyOrderModel(
            conditions, tokens.vocabulary, tokens.grid, **model_options(size_config(config.model.size), config.model)
        )

    def draws(self, batch: int, progress: float | None, generator: Generator) -> dict[str, Tensor]:
        """Step ids [B, N]."""
        return {"step_ids": self.mixture.sample(batch, generator)}

    def drop(self, condition: Condition, uniform: Tensor) -> Condition:
        """The model has no dropout share of its own."""
        return self.vocabulary.drop(condition, self.config.condition.dropout, uniform)


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    require_share(config.orders, "random_share", "merge_share", prefix="orders.")
    steps = config.orders.steps
    require(bool(steps) and min(steps) > 0, "orders.steps must list counts above 0")
    require_share(config.model, "dropout", prefix="model.", below_one=True)
    require_positive(config.model, "prefix_limit", prefix="model.")
    mixture(config, check_generator(config, AnyOrderSystem).grid)


missing, sketch = AnyOrderSystem.missing, AnyOrderSystem.sketch


def build(config: Config, device: torch.device) -> AnyOrderSystem:
    """Opens the token sets and makes the model."""
    return AnyOrderSystem(config, device)


def mixture(config: Config, grid: Grid) -> OrderMixture:
    """The orders of the config for a grid. Raises VgenError for unknown ones."""
    orders = config.orders
    return OrderMixture(grid, orders.named, orders.random_share, orders.steps, merge_share=orders.merge_share)
