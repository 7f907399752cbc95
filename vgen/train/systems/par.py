"""Training PAR: n tokens at once, one in each of n regions (arXiv 2412.15119; `system: par`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vgen.models.llama.par import PARModel
from vgen.settings import require_share
from vgen.train.systems import llamagen
from vgen.train.systems.generator import GeneratorConfig, check_generator


@dataclass(frozen=True)
class ModelConfig(llamagen.ModelConfig):
    """A size such as `XL-4x` or `3B-16x`; parallel: tokens a call, a square number, in place of the size's."""

    size: str = "L-4x"
    parallel: int | None = None


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: par`."""

    model: ModelConfig = field(default_factory=ModelConfig)


class PARSystem(llamagen.LlamaSystem):
    """PAR."""

    model_class = PARModel


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    require_share(config.model, *llamagen.DROPOUTS, prefix="model.", below_one=True)
    check_generator(config, PARSystem)


missing, sketch = PARSystem.missing, PARSystem.sketch


def build(config: Config, device: torch.device) -> PARSystem:
    """Opens the token sets and makes the model."""
    return PARSystem(config, device)
