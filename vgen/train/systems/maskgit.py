"""Training MaskGIT: cross-entropy of masked tokens (arXiv 2202.04200, section 3.1; TiTok, arXiv 2406.07550; `system: maskgit`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from vgen.data.tokens import TokenSetSpec
from vgen.models.masked.base import MASK_SCHEDULES
from vgen.models.masked.maskgit import MaskGIT, MaskGITUViTModel, MaskGITViTModel
from vgen.samplers.types import grid_size
from vgen.settings import require, require_choice, require_not_negative, require_share
from vgen.train.systems.generator import GeneratorConfig, GeneratorSystem, check_generator, model_options

NETWORKS: dict[str, type[MaskGIT]] = {"vit": MaskGITViTModel, "uvit": MaskGITUViTModel}
SIZES = {size: name for name, network in NETWORKS.items() for size in network.SIZES}
DROPOUTS = ("dropout", "attention_dropout")


@dataclass(frozen=True)
class ModelConfig:
    """A named size of MaskGITViTModel or MaskGITUViTModel, which decides about the network; what is set replaces the size's own value.

    dropout, attention_dropout: of the ViT. mask_schedule, unmasked_weight, label_smoothing: of the loss.
    """

    size: str = "L-32"
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    hidden: int | None = None
    dropout: float | None = None
    attention_dropout: float | None = None
    mask_schedule: str = "arccos"
    unmasked_weight: float = 0.1
    label_smoothing: float = 0.1


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: maskgit`."""

    model: ModelConfig = field(default_factory=ModelConfig)


class MaskGITSystem(GeneratorSystem):
    """MaskGIT, either network. Its score is the objective of training: label smoothing and the masks are part of it."""

    @classmethod
    def make_model(cls, config: Config, tokens: TokenSetSpec, conditions: int) -> MaskGIT:
        """See `GeneratorSystem.make_model`."""
        network = NETWORKS[SIZES[config.model.size]]
        options = model_options(network.size_config(config.model.size), config.model)
        options |= {"codes": tokens.vocabulary, "grid": tokens.grid, "classes": conditions}
        condition = config.condition
        return network(conditioning=condition.kind, condition_dropout=condition.dropout, **options)

    def draws(self, batch: int, progress: float | None, generator: Generator) -> dict[str, Tensor]:
        """How many tokens are masked, from uniform [B], and which, from permutation [B, L]."""
        return mask_draws(batch, grid_size(self.train_tokens.grid), generator)


def mask_draws(batch: int, length: int, generator: Generator) -> dict[str, Tensor]:
    """The draws of `MaskedTokenModel.loss`: uniform [B] and permutation [B, L]."""
    return {
        "uniform": torch.rand(batch, generator=generator),
        "permutation": torch.rand(batch, length, generator=generator).argsort(dim=1),
    }


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    model = config.model
    require_choice("model.size", model.size, SIZES)
    require_choice("model.mask_schedule", model.mask_schedule, MASK_SCHEDULES)
    dropouts = [name for name in DROPOUTS if getattr(model, name) is not None]
    require(
        SIZES[model.size] == "vit" or not dropouts,
        f"model.{' and model.'.join(dropouts)}: the U-ViT of size {model.size} has no dropout, leave it out",
    )
    require_share(model, *dropouts, prefix="model.", below_one=True)
    require_share(model, "label_smoothing", prefix="model.", below_one=True)
    require_not_negative(model, "unmasked_weight", prefix="model.")
    check_generator(config, MaskGITSystem)


missing, sketch = MaskGITSystem.missing, MaskGITSystem.sketch


def build(config: Config, device: torch.device) -> MaskGITSystem:
    """Opens the token sets and makes the model."""
    return MaskGITSystem(config, device)
