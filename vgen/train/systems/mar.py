"""Training MAR: the head's loss on masked tokens (arXiv 2406.11838, sections 3.3 and 4; `system: mar`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from vgen.data.tokens import TokenSetSpec
from vgen.models.mar.backbone import mask_rate
from vgen.models.mar.heads import HEADS
from vgen.models.mar.mar import MARModel
from vgen.samplers.types import grid_size
from vgen.settings import require_choice, require_positive, require_share
from vgen.train.systems.generator import GeneratorConfig, GeneratorSystem, check_generator, model_options


@dataclass(frozen=True)
class AutoencoderConfig:
    """What models on `MaskedAutoencoder` share: a named size, whose own values are replaced by what is set."""

    size: str = "B"
    encoder_width: int | None = None
    encoder_layers: int | None = None
    encoder_heads: int | None = None
    decoder_width: int | None = None
    decoder_layers: int | None = None
    decoder_heads: int | None = None
    buffer: int | None = None
    head_width: int | None = None
    head_layers: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.1
    mask_ratio_min: float = 0.7


@dataclass(frozen=True)
class ModelConfig(AutoencoderConfig):
    """See `MARModel` for the meanings."""

    head: str = "diffusion"
    diffusion_batch: int = 4


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: mar`."""

    model: ModelConfig = field(default_factory=ModelConfig)


class MaskedAutoencoderSystem(GeneratorSystem):
    """What models on `MaskedAutoencoder` share: their loss takes the known tokens (`shown`), as many in all samples."""

    continuous = True

    def draws(self, batch: int, progress: float | None, generator: Generator) -> dict[str, Tensor]:
        """One share of masked tokens for the (per-process) batch, and which ones: shown [B, v]."""
        rate = mask_rate(float(torch.rand((), generator=generator)), self.model.config.mask_ratio_min)
        orders = torch.rand(batch, grid_size(self.train_tokens.grid), generator=generator).argsort(dim=1)
        return {"shown": self.model.draw_shown(orders, rate)}


class MARSystem(MaskedAutoencoderSystem):
    """MAR with any head. Its score is the objective of training, which differs from head to head."""

    score = ("loss", -1)

    @classmethod
    def make_model(cls, config: Config, tokens: TokenSetSpec, conditions: int) -> MARModel:
        """See `GeneratorSystem.make_model`."""
        options = model_options(MARModel.size_config(config.model.size), config.model)
        options |= {"channels": tokens.channels, "grid": tokens.grid, "classes": conditions}
        condition = config.condition
        return MARModel(conditioning=condition.kind, condition_dropout=condition.dropout, **options)


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    model = config.model
    require_choice("model.size", model.size, MARModel.SIZES)
    require_choice("model.head", model.head, HEADS)
    require_share(model, "dropout", "attention_dropout", prefix="model.", below_one=True)
    require_positive(model, "diffusion_batch", prefix="model.")
    check_generator(config, MARSystem)


missing, sketch = MARSystem.missing, MARSystem.sketch


def build(config: Config, device: torch.device) -> MARSystem:
    """Opens the token sets and makes the model."""
    return MARSystem(config, device)
