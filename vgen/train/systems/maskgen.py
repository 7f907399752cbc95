"""Training MaskGen on captions through a frozen CLIP: codes, or continuous tokens (arXiv 2501.07730, section 3.3; `system: maskgen`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from vgen.data.tokens import TokenSetSpec
from vgen.models.conditions.clip import REPOSITORY, ClipCaptions
from vgen.models.masked.base import MASK_SCHEDULES
from vgen.models.masked.maskgen import WIDTHS, MaskGen, MaskGenVQModel
from vgen.models.masked.maskgen_kl import MaskGenKLModel
from vgen.samplers.types import Condition, grid_size
from vgen.settings import require, require_choice, require_not_negative, require_positive, require_share
from vgen.train.systems.generator import (
    ConditionConfig,
    GeneratorConfig,
    GeneratorSystem,
    check_generator,
    model_options,
)
from vgen.train.systems.maskgit import mask_draws
from vgen.train.systems.start import check_start, load_start

# Settings of one kind alone.
OWN = {
    "vq": ("unmasked_weight", "label_smoothing", "spare_rows"),
    "kl": ("head_width", "head_layers", "diffusion_batch"),
}
SIZED = ("width", "layers", "heads", "text_width", *OWN["kl"])
MAY_BE_ZERO = ("micro_width", "unmasked_weight", "spare_rows")


@dataclass(frozen=True)
class ModelConfig:
    """kind: vq (MaskGenVQModel, on codes) or kl (MaskGenKLModel, on latents); size: one of theirs; what is set replaces the size's own value.

    text_width: of the CLIP tower's states; micro_width: features of the aesthetic score (0: none); aesthetic: the score of pictures
    without one, and of previews. unmasked_weight, label_smoothing, spare_rows: of vq; head_width, head_layers, diffusion_batch: of kl.
    """

    kind: str = "vq"
    size: str = "L"
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    text_width: int | None = None
    micro_width: int | None = None
    aesthetic: float | None = None
    mask_schedule: str = "arccos"
    unmasked_weight: float | None = None
    label_smoothing: float | None = None
    spare_rows: int | None = None
    head_width: int | None = None
    head_layers: int | None = None
    diffusion_batch: int | None = None


@dataclass(frozen=True)
class ClipConfig(ConditionConfig):
    """MaskGen's condition: captions through the frozen CLIP text tower `text_encoder`, a name or folder of transformers."""

    kind: str = "text"
    text_encoder: str = REPOSITORY


@dataclass(frozen=True)
class Config(GeneratorConfig):
    """`system: maskgen`. start: folder of a model of the same kind and shape whose weights are the first (None: fresh ones), for the
    paper's second stage on better pictures: `model/` of an exported pipeline.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    condition: ClipConfig = field(default_factory=ClipConfig)
    start: str | None = None


class MaskGenSystem(GeneratorSystem):
    """What both kinds share: captions, aesthetic scores, masks. The score is the objective of training, masks included."""

    conditions: ClassVar[Sequence[str]] = ("text",)
    captions_kind = ClipCaptions
    model_class: ClassVar[type[MaskGen]]

    def __init__(self, config: Config, device: torch.device):
        super().__init__(config, device)
        self.model.check_condition(self.vocabulary.null(1))  # raises for a tower of another width
        if config.start is not None:
            load_start(self.model, config.start)

    @classmethod
    def size_options(cls, config: Config, tokens: TokenSetSpec) -> dict[str, Any]:
        """Constructor arguments that both kinds have."""
        options = model_options(cls.model_class.size_config(config.model.size), config.model)
        del options["kind"]
        return {**options, "grid": tokens.grid, "condition_dropout": config.condition.dropout}

    def _objective(
        self, condition: Condition, batch: Mapping[str, Any], draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """With the aesthetic scores of the pictures, where the data has any."""
        if "aesthetic" in batch:
            score = batch["aesthetic"].nan_to_num(self.model.config.aesthetic)
            condition = Condition(condition.ids, condition.mask, {**condition.extras, "aesthetic": score})
        return super()._objective(condition, batch, draws)


class MaskGenVQSystem(MaskGenSystem):
    """MaskGen-VQ: cross-entropy of masked codes."""

    model_class = MaskGenVQModel

    @classmethod
    def make_model(cls, config: Config, tokens: TokenSetSpec, conditions: int) -> MaskGenVQModel:
        """See `GeneratorSystem.make_model`."""
        return MaskGenVQModel(**{**cls.size_options(config, tokens), "codes": tokens.vocabulary})

    def draws(self, batch: int, progress: float | None, generator: Generator) -> dict[str, Tensor]:
        """How many tokens are masked, from uniform [B], and which, from permutation [B, L]."""
        return mask_draws(batch, grid_size(self.train_tokens.grid), generator)


class MaskGenKLSystem(MaskGenSystem):
    """MaskGen-KL: the diffusion loss of masked tokens."""

    score = ("loss", -1)
    continuous = True
    model_class = MaskGenKLModel

    @classmethod
    def make_model(cls, config: Config, tokens: TokenSetSpec, conditions: int) -> MaskGenKLModel:
        """See `GeneratorSystem.make_model`."""
        return MaskGenKLModel(**{**cls.size_options(config, tokens), "channels": tokens.channels})

    def draws(self, batch: int, progress: float | None, generator: Generator) -> dict[str, Tensor]:
        """How many tokens are masked, from uniform [1] for the whole batch, and which, from orders [B, L]."""
        length = grid_size(self.train_tokens.grid)
        return {
            "uniform": torch.rand(1, generator=generator),
            "orders": torch.rand(batch, length, generator=generator).argsort(dim=1),
        }


KINDS: dict[str, type[MaskGenSystem]] = {"vq": MaskGenVQSystem, "kl": MaskGenKLSystem}


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work."""
    model = config.model
    require_choice("model.kind", model.kind, KINDS)
    require_choice("model.size", model.size, WIDTHS)
    require_choice("model.mask_schedule", model.mask_schedule, MASK_SCHEDULES)
    given = [name for name, value in asdict(model).items() if value is not None]
    for kind, names in OWN.items():
        foreign = [name for name in names if kind != model.kind and name in given]
        require(not foreign, f"model.{' and model.'.join(foreign)}: of model.kind={kind} alone, leave it out")
    require_not_negative(model, *(name for name in MAY_BE_ZERO if name in given), prefix="model.")
    require_positive(model, *(name for name in SIZED if name in given), prefix="model.")
    if "label_smoothing" in given:
        require_share(model, "label_smoothing", prefix="model.", below_one=True)
    if config.start is not None:
        check_start("start", config.start)
    check_generator(config, KINDS[model.kind])


missing = MaskGenSystem.missing


def sketch(config: Config) -> dict[str, nn.Module]:
    """See `GeneratorSystem.sketch`."""
    return KINDS[config.model.kind].sketch(config)


def build(config: Config, device: torch.device) -> MaskGenSystem:
    """Opens token sets and text tower and makes the model."""
    return KINDS[config.model.kind](config, device)
