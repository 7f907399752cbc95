"""Training a MingTok on pictures: reconstruction from whole and masked inputs, and frozen teachers' features (`system: mingtok`).

The recipe is only partly published (arXiv 2510.06590): see tokenizers_vis/mingtok/training.py and configs/mingtok/vision.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from vgen.settings import require, require_choice, require_not_negative, require_positive, require_share
from vgen.tokenizers_vis.losses.alignment import Teacher
from vgen.tokenizers_vis.mingtok.losses import PATCH_LOSSES
from vgen.tokenizers_vis.mingtok.training import MingTokObjective, TeacherTerm, draw_mask, paste_hidden
from vgen.train.system import Loss, autocast
from vgen.train.systems.perceptual import PerceptualConfig, check_perceptual, make_perceptual
from vgen.train.systems.pictures import (
    PictureConfig,
    PictureSystem,
    check_pictures,
    make_model,
    missing,  # noqa: F401 (a part of a system)
)

TEACHERS = ("latent", "semantic")


@dataclass(frozen=True)
class LossConfig(PerceptualConfig):
    """Weights of the terms, on pictures in [-1, 1]. Perceptual distance: `PerceptualConfig` (none in the release).

    reconstruction: between patches, a name of `mingtok_losses.PATCH_LOSSES`; masked_share: share of pictures that are masked,
    mask_ratio: share of their patches.

    *_teacher: vision transformer of transformers (name or folder) whose features are predicted where the input is masked, from
    the latents (the paper: such as DINOv2) and from the semantic features (such as CLIP); None: no such term. *_size: side of the
    pictures it sees; *_weight: of the term; head_width: of the heads that predict.
    """

    reconstruction: str = "L1-plain"
    masked_share: float = 0.0
    mask_ratio: float = 0.4
    latent_teacher: str | None = None
    latent_size: int = 224
    latent_weight: float = 1.0
    semantic_teacher: str | None = None
    semantic_size: int = 224
    semantic_weight: float = 1.0
    head_width: int = 1024


@dataclass(frozen=True)
class Config(PictureConfig):
    """`system: mingtok`."""

    family: str = "mingtok"
    loss: LossConfig = field(default_factory=LossConfig)


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work, before pictures, weights or teachers are loaded."""
    loss = config.loss
    check_pictures(config, ("mingtok",))
    check_perceptual(loss, config.data.size)
    require_choice("loss.reconstruction", loss.reconstruction, PATCH_LOSSES)
    require_share(loss, "masked_share", prefix="loss.")
    require_share(loss, "mask_ratio", prefix="loss.", below_one=True)
    require_not_negative(loss, "latent_weight", "semantic_weight", prefix="loss.")
    require_positive(loss, "latent_size", "semantic_size", "head_width", prefix="loss.")
    for name in TEACHERS:
        require(
            getattr(loss, f"{name}_teacher") is None or loss.masked_share > 0 < loss.mask_ratio,
            f"loss.{name}_teacher teaches where the input is masked: set loss.masked_share and loss.mask_ratio above 0",
        )


def sketch(config: Config) -> dict[str, nn.Module]:
    """The network on the meta device, without the heads that follow from teachers; no data is opened."""
    with torch.device("meta"):
        return {"tokenizer": make_model(config)}


def build(config: Config, device: torch.device) -> MingTokSystem:
    """Opens data and teachers and makes the networks."""
    return MingTokSystem(config, device)


class MingTokSystem(PictureSystem):
    """Encoder, semantic decoder and pixel decoder, one objective."""

    score = ("psnr", 1)

    def __init__(self, config: Config, device: torch.device):
        super().__init__(config, device, make_model(config))
        loss = config.loss
        self.teachers: dict[str, Teacher] = {}
        terms: dict[str, TeacherTerm] = {}
        for name in TEACHERS:
            source, size, weight = (getattr(loss, f"{name}_{part}") for part in ("teacher", "size", "weight"))
            if source is not None:
                self.teachers[name] = Teacher(source, size).to(device)
                terms[f"{name}_term"] = TeacherTerm(self.teachers[name].width, weight, loss.head_width)
        self.perceptual = make_perceptual(loss)
        if self.perceptual is not None:
            self.perceptual.to(device)
        objective = MingTokObjective(
            self.model, reconstruction=loss.reconstruction, masks=loss.masked_share > 0, **terms
        )
        self.networks: dict[str, nn.Module] = {"tokenizer": objective}
        self.optimizers = {"tokenizer": config.optimizer}

    def losses(self, batch: dict[str, Any], step: int, generator: Generator) -> Iterator[Loss]:
        """All terms of one forward, under a fresh mask."""
        pixels, loss = batch["image"], self.config.loss
        masked = self._mask(pixels, generator) if loss.masked_share > 0 else None
        with autocast(self.config, pixels.device):
            teachers = {name: teacher(pixels) for name, teacher in self.teachers.items()}
        output, terms = self.networks["tokenizer"](pixels, masked, teachers)
        value = terms.pop("loss")
        if self.perceptual is not None:
            made = paste_hidden(output.reconstruction, pixels, masked, self.model.config.patch_size)
            with autocast(self.config, pixels.device):
                distance = self.perceptual(pixels, made).mean()
            value = value + loss.perceptual_weight * distance
            terms["perceptual"] = distance.detach()
        yield Loss("tokenizer", value, {**terms, **self.latent.logs(output)})

    def _mask(self, pixels: Tensor, generator: Generator) -> Tensor:
        """[B, N] bool, drawn anew for every batch."""
        _, height, width = self.model.spec.grid(*pixels.shape[-2:])
        draws = torch.rand(len(pixels), 1 + height * width, generator=generator, device=generator.device)
        order = draws[:, 1:].argsort(dim=1).to(pixels.device)
        return draw_mask(
            draws[:, 0].to(pixels.device), order, self.config.loss.masked_share, self.config.loss.mask_ratio
        )

    def after_step(self, step: int, generator: Generator, averages: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Says when latents hardly differ from picture to picture."""
        return self.latent.after_step(step)

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
        """A MingTok folder with the scale of its latents; mask token and heads stay behind."""
        prefix = "model."
        named = weights["tokenizer"].items()
        self.save_model(folder, {k.removeprefix(prefix): v for k, v in named if k.startswith(prefix)}, dtype)
