"""Training a tokenizer of any kind: reconstruction + perceptual distance + GAN + what its latent asks for (`system: tokenizer`).

The recipe is VQGAN's (arXiv 2012.09841); weights, discriminator and regulariser are settings, so that LlamaGen's VQ, TiTok's
and TA-TiTok's (arXiv 2406.07550, 2501.07730) and KL autoencoders are configs of one system.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Generator, Tensor, nn

from vgen.settings import require, require_choice, require_not_negative, require_positive
from vgen.tokenizers_vis.losses.objectives import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, RECONSTRUCTION_LOSSES, VQLoss
from vgen.tokenizers_vis.losses.patchgan import BlurDiscriminator, PatchDiscriminator
from vgen.train.config import OptimizerConfig, check_optimizer
from vgen.train.system import Loss, autocast
from vgen.train.systems.perceptual import PerceptualConfig, check_perceptual, make_perceptual
from vgen.train.systems.pictures import PictureConfig, PictureSystem, check_pictures, check_restarts, make_model
from vgen.train.systems.pictures import missing as missing_data
from vgen.train.systems.start import check_start, load_start

FAMILIES = ("vq", "titok_vq", "titok_vae", "titok_legacy", "kl", "maskgit_vqgan", "chameleon_vqgan")
DISCRIMINATORS = {"patch": PatchDiscriminator, "blur": BlurDiscriminator}  # width, halvings
WON = 0.98  # share of logits on the right side, of both kinds, from which on a discriminator has won


@dataclass(frozen=True)
class StartConfig:
    """Where the weights come from. model: a folder of the same family and shape (None: fresh weights); freeze_codes: train the
    decoder alone, so that the tokens of every picture stay what they are and cached tokens and generators stay valid.
    """

    model: str | None = None
    freeze_codes: bool = False


@dataclass(frozen=True)
class LossConfig(PerceptualConfig):
    """Weights of the terms, on pictures in [-1, 1]. Perceptual distance: `PerceptualConfig`.

    disc_start: first step (from 1) with GAN terms; past the last step: none at all. discriminator: `patch` (PatchGAN) or `blur`
    (TiTok's), with disc_width channels at first and disc_layers halvings. kl_weight: of a continuous latent's nats a picture.
    restart_every: steps between revivals of unused codes (0: never), up to the share `restart_until` of the run.
    """

    reconstruction: str = "l2"
    reconstruction_weight: float = 1.0
    kl_weight: float = 1e-6
    disc: str = "hinge"
    gen: str = "hinge"
    disc_weight: float = 0.5
    disc_start: int = 20000
    disc_adaptive_weight: bool = False
    disc_own_weight: float | None = None  # of the discriminator's own objective; None: disc_weight
    lecam_weight: float = 0.0
    discriminator: str = "patch"
    disc_width: int = 64
    disc_layers: int = 3
    restart_every: int = 0
    restart_until: float = 0.7


@dataclass(frozen=True)
class Config(PictureConfig):
    """`system: tokenizer`."""

    start: StartConfig = field(default_factory=StartConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: OptimizerConfig = field(default_factory=OptimizerConfig)


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work, before pictures or weights are loaded."""
    check_restarts(config.loss, check_pictures(config, FAMILIES))
    loss, start = config.loss, config.start
    check_perceptual(loss, config.data.size)
    weights = ("reconstruction_weight", "kl_weight", "disc_weight", "lecam_weight")
    require_not_negative(loss, *weights, "disc_start", prefix="loss.")
    require_positive(loss, "disc_width", "disc_layers", prefix="loss.")
    require_choice("loss.reconstruction", loss.reconstruction, RECONSTRUCTION_LOSSES)
    require_choice("loss.disc", loss.disc, DISCRIMINATOR_LOSSES)
    require_choice("loss.gen", loss.gen, GENERATOR_LOSSES)
    require_choice("loss.discriminator", loss.discriminator, DISCRIMINATORS)
    with torch.device("meta"):
        DISCRIMINATORS[loss.discriminator](3, loss.disc_width, loss.disc_layers)  # raises for impossible sizes
    check_optimizer(config.discriminator, "discriminator.")
    if start.model is not None:
        check_start("start.model", start.model)
    if start.freeze_codes:
        require(start.model is not None, "start.freeze_codes keeps the codes of start.model, which is not set")
        require(loss.restart_every == 0, "start.freeze_codes and loss.restart_every contradict each other; set it to 0")


def started_model(config: Config) -> ModelMixin:
    """The model that training begins with: fresh, or `start.model`, with the coding half frozen where asked."""
    model = make_model(config)
    if config.start.model is not None:
        load_start(model, config.start.model)
    if config.start.freeze_codes:
        for name, parameter in model.named_parameters():
            if name.split(".")[0] in model.coding_parts:
                parameter.requires_grad_(False)
    return model


def missing(config: Config) -> list[str]:
    """What the config names and is not there yet."""
    start = config.start.model
    return [*missing_data(config), *([start] if start is not None and not Path(start).exists() else [])]


def sketch(config: Config) -> dict[str, nn.Module]:
    """The networks on the meta device; no data is opened."""
    loss = config.loss
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {"tokenizer": make_model(config)}
        if loss.disc_start <= config.steps:
            networks["discriminator"] = DISCRIMINATORS[loss.discriminator](3, loss.disc_width, loss.disc_layers)
    return networks


def build(config: Config, device: torch.device) -> TokenizerSystem:
    """Opens the data and makes the networks."""
    return TokenizerSystem(config, device)


class Critic(nn.Module):
    """The discriminator's objective as one forward pass: DDP must see exactly one forward per backward."""

    def __init__(self, objective: VQLoss):
        super().__init__()
        self.objective = objective

    def forward(self, pixels: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """The discriminator's terms at `step` (from 1)."""
        return self.objective.discriminate(pixels, reconstruction, step)


class Balance:
    """Watches whether the discriminator wins outright: then its gradients say nothing, and reconstructions drift."""

    def __init__(self) -> None:
        self.accuracies: list[Tensor] = []  # of the steps since the last look, left on the device

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """The discriminator's terms of a step."""
        self.accuracies.append(torch.stack((terms["real_accuracy"], terms["fake_accuracy"])))

    def look(self) -> list[str]:
        """A warning, or nothing. Synchronises."""
        if not self.accuracies:
            return []
        real, fake = torch.stack(self.accuracies).mean(dim=0).tolist()
        self.accuracies.clear()
        if min(real, fake) < WON:
            return []
        return [
            f"warning: the discriminator wins outright (right about {real:.1%} of real and {fake:.1%} of reconstructed patches); "
            "lower discriminator.lr or loss.disc_width, raise loss.lecam_weight, or start it later (loss.disc_start)"
        ]


class TokenizerSystem(PictureSystem):
    """Autoencoder and discriminator, alternating on the same reconstructions."""

    score = ("psnr", 1)

    def __init__(self, config: Config, device: torch.device):
        super().__init__(config, device, started_model(config))
        loss = config.loss
        discriminator = DISCRIMINATORS[loss.discriminator](3, loss.disc_width, loss.disc_layers)
        options = {
            "reconstruction_loss": loss.reconstruction,
            "reconstruction_weight": loss.reconstruction_weight,
            "perceptual_weight": loss.perceptual_weight,
            "disc_loss": loss.disc,
            "gen_loss": loss.gen,
            "disc_weight": loss.disc_weight,
            "disc_start": loss.disc_start,
            "disc_adaptive_weight": loss.disc_adaptive_weight,
            "disc_own_weight": loss.disc_own_weight,
            "lecam_weight": loss.lecam_weight,
        }
        # Two views of one discriminator: the critic is what checkpoints hold, so the frozen perceptual weights stay out of it.
        self.objective = VQLoss(discriminator, make_perceptual(loss), **options).to(device)
        self.networks: dict[str, nn.Module] = {"tokenizer": self.model}
        self.optimizers = {"tokenizer": config.optimizer}
        if self.objective.adversarial(config.steps):
            self.networks["discriminator"] = Critic(VQLoss(discriminator, None, **options))
            self.optimizers["discriminator"] = config.discriminator
        self.balance = Balance()
        self.latest: Tensor | None = None  # pictures of the step at hand, for reviving codes

    def losses(self, batch: dict[str, Any], step: int, generator: Generator) -> Iterator[Loss]:
        """The autoencoder's objective, then the discriminator's on the detached reconstruction of the same forward."""
        pixels = self.latest = batch["image"]
        draws = self.latent.draws(len(pixels), generator)
        output = self.networks["tokenizer"](pixels, **draws, **self.text(batch["caption"]))
        with autocast(self.config, pixels.device):
            terms = self.objective.generator(
                pixels,
                output.reconstruction,
                self.latent.regulariser(output),
                step + 1,
                last_layer=self.model.last_layer,
            )
        value = terms.pop("loss")
        yield Loss("tokenizer", value, {**terms, **self.latent.logs(output)})
        if "discriminator" in self.networks and self.objective.adversarial(step + 1):
            terms = self.networks["discriminator"](pixels, output.reconstruction.detach(), step + 1)
            self.balance.add(terms)
            value = terms.pop("loss")
            yield Loss("discriminator", value, terms)

    def after_step(self, step: int, generator: Generator, averages: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Revives unused codes; says when codebook or posterior have collapsed or the discriminator has won."""
        messages = self.latent.after_step(step, self.latest, averages.get("tokenizer", {}))
        return messages + (self.balance.look() if (step + 1) % self.config.log_every == 0 else [])

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
        """A folder with the tokenizer."""
        self.save_model(folder, weights["tokenizer"], dtype)
