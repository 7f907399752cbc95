"""Training Hi-MAR: both phases on every batch (arXiv 2505.20288, sections 3.2 to 3.4; `system: himar`).

Needs a token set with the latents of the pictures made smaller (`vgen tokenize --low-res`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from vgen.data.tokens import TokenSetSpec
from vgen.errors import VgenError
from vgen.models.mar.backbone import mask_rate
from vgen.models.mar.himar import DENSE_MASKS, HiMARModel
from vgen.samplers.types import Condition, grid_size
from vgen.settings import require_choice, require_positive, require_share
from vgen.train.systems.generator import GeneratorConfig, GeneratorSystem, check_generator, model_options


@dataclass(frozen=True)
class ModelConfig:
    """A named size of HiMARModel; what is set replaces the size's own value. See `HiMARModel` for the meanings."""

    size: str = "B"
    width: int | None = None
    encoder_layers: int | None = None
    encoder_heads: int | None = None
    decoder_layers: int | None = None
    decoder_heads: int | None = None
    buffer: int | None = None
    head_width: int | None = None
    head_layers: int | None = None
    grid_head_width: int | None = None
    grid_head_layers: int | None = None
    grid_head_heads: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.1
    mask_ratio_min: float = 0.7
    dense_masks: str = "cosine"
    pivot_rate: float = 0.25
    diffusion_batch: int = 4


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: himar`. pivot_warmup: share of the training over which `model.pivot_rate` is reached (the release: 100 of 800 epochs)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    pivot_warmup: float = 0.125


class HiMARSystem(GeneratorSystem):
    """Hi-MAR. Its score is the objective of training: the weighted sum of the two phases' losses."""

    score = ("loss", -1)
    continuous = True

    @classmethod
    def make_model(cls, config: Config, tokens: TokenSetSpec, conditions: int) -> HiMARModel:
        """See `GeneratorSystem.make_model`."""
        if tokens.low_grid is None:
            raise VgenError(
                f"data.tokens: {config.data.tokens} holds no latents of smaller pictures, which Hi-MAR makes first; "
                "run `vgen tokenize` with --low-res"
            )
        options = model_options(HiMARModel.size_config(config.model.size), config.model)
        options |= {"channels": tokens.channels, "grid": tokens.grid, "low_grid": tokens.low_grid}
        condition = config.condition
        return HiMARModel(
            conditioning=condition.kind, classes=conditions, condition_dropout=condition.dropout, **options
        )

    def drop(self, condition: Condition, uniform: Tensor) -> Condition:
        """Nothing: either phase drops conditions of its own, inside the model's loss."""
        return condition

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `GeneratorSystem.inputs`."""
        return {"low": batch["low"]}

    def draws(self, batch: int, progress: float | None, generator: Generator) -> dict[str, Tensor]:
        """What either phase knows, as many tokens in all samples of the (per-process) batch; which conditions are dropped, and
        which samples see the pivots. In evaluation no condition is dropped."""
        model, spec = self.model, self.train_tokens.spec
        low_rate, rate = torch.rand(2, generator=generator).tolist()
        low_orders, orders = (
            torch.rand(batch, grid_size(grid), generator=generator).argsort(dim=1)
            for grid in (spec.low_grid, spec.grid)
        )
        drops, uniform = torch.rand(2, batch, generator=generator), torch.rand(batch, generator=generator)
        warmup = self.config.pivot_warmup
        ramp = 1.0 if progress is None or not warmup else min(1.0, progress / warmup)
        return {
            "low_shown": model.draw_shown(low_orders, mask_rate(low_rate, model.config.mask_ratio_min)),
            "shown": model.draw_shown(orders, model.dense_rate(rate)),
            "drops": torch.ones_like(drops) if progress is None else drops,
            "steered": model.steered(uniform, ramp),
        }


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    model = config.model
    require_choice("model.size", model.size, HiMARModel.SIZES)
    require_choice("model.dense_masks", model.dense_masks, DENSE_MASKS)
    require_share(model, "dropout", "attention_dropout", prefix="model.", below_one=True)
    require_share(model, "pivot_rate", prefix="model.")
    require_share(config, "pivot_warmup")
    require_positive(model, "diffusion_batch", prefix="model.")
    check_generator(config, HiMARSystem)


missing, sketch = HiMARSystem.missing, HiMARSystem.sketch


def build(config: Config, device: torch.device) -> HiMARSystem:
    """Opens the token sets and makes the model."""
    return HiMARSystem(config, device)
