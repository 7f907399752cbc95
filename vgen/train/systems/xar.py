"""Training xAR: velocities of noisy entities behind noisy entities (arXiv 2502.20388, noisy context learning; `system: xar`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from vgen.data.tokens import TokenSetSpec
from vgen.models.xar.xar import SIZES, XARModel
from vgen.samplers.types import grid_size
from vgen.settings import require_choice, require_share
from vgen.train.systems.generator import GeneratorConfig, GeneratorSystem, check_generator, model_options


@dataclass(frozen=True)
class ModelConfig:
    """A named size of `vgen.models.xar.xar.SIZES`; a number that is set replaces that of the size.

    entities: what is predicted at once (`vgen.models.xar.entities`).
    """

    size: str = "B"
    entities: str = "blocks-8"
    width: int | None = None
    encoder_depth: int | None = None
    decoder_depth: int | None = None
    heads: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.1


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: xar`."""

    model: ModelConfig = field(default_factory=ModelConfig)


class XARSystem(GeneratorSystem):
    """xAR. Its score is the objective of training, of which much depends on the latents: it compares runs on one token set only."""

    score = ("loss", -1)
    continuous = True

    @classmethod
    def make_model(cls, config: Config, tokens: TokenSetSpec, conditions: int) -> XARModel:
        """See `GeneratorSystem.make_model`."""
        return XARModel(
            channels=tokens.channels,
            grid=tokens.grid,
            conditioning=config.condition.kind,
            classes=conditions,
            condition_dropout=config.condition.dropout,
            **model_options(XARModel.size_config(config.model.size), config.model),
        )

    def draws(self, batch: int, progress: float | None, generator: Generator) -> dict[str, Tensor]:
        """N(0, 1) draws: normal [B, K] for the times of the entities, noise [B, N, C] for their tokens."""
        model = self.model
        tokens = sum(map(grid_size, model.grids))
        return {
            "normal": torch.randn(batch, model.order.calls, generator=generator),
            "noise": torch.randn(batch, tokens, model.config.channels, generator=generator),
        }


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    require_choice("model.size", config.model.size, SIZES)
    require_share(config.model, "dropout", "attention_dropout", prefix="model.", below_one=True)
    check_generator(config, XARSystem)


missing, sketch = XARSystem.missing, XARSystem.sketch


def build(config: Config, device: torch.device) -> XARSystem:
    """Opens the token sets and makes the model."""
    return XARSystem(config, device)
