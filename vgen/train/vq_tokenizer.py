"""Training a VQ tokenizer: reconstruction + perceptual distance + PatchGAN + quantizer losses (LlamaGen, arXiv 2406.06525, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from torch import Generator, Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.data.batches import batches
from vgen.data.dataset import open_images
from vgen.data.images import Augment
from vgen.layers.pixels import to_images
from vgen.tokenizers_vis.base import to_uint8
from vgen.tokenizers_vis.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, RECONSTRUCTION_LOSSES, VQLoss
from vgen.tokenizers_vis.patchgan import PatchDiscriminator
from vgen.tokenizers_vis.perceptual import LPIPS, PyramidLoss
from vgen.tokenizers_vis.vq import VQModel
from vgen.train.config import (
    OptimizerConfig,
    TrainConfig,
    check_optimizer,
    require,
    require_choice,
    require_not_negative,
    require_positive,
    require_share,
)
from vgen.train.metrics import psnr, ssim
from vgen.train.system import Loss, autocast, spread, to_dtype
from vgen.viz.sheets import sheet

PERCEPTUAL = ("pyramid", "lpips", "none")


@dataclass(frozen=True)
class DataConfig:
    """path: whatever `open_images` reads; size: side in pixels; min_scale: smallest random crop (share of a side, 1: none);
    flip: share of training pictures that are mirrored."""

    path: str
    size: int = 64
    train_split: str = "train"
    held_out_split: str = "heldout"
    min_scale: float = 1.0
    flip: float = 0.5
    workers: int = 0  # loading processes; 0: load between steps
    cache: bool = True  # keep decoded pictures in memory


@dataclass(frozen=True)
class ModelConfig:
    """A named size of `tokenizers_vis.vq.SIZES`; every other field replaces one of its numbers when set."""

    size: str = "emoji-f8"
    ch: int | None = None
    encoder_ch_mult: list[int] | None = None
    decoder_ch_mult: list[int] | None = None
    num_res_blocks: int | None = None
    z_channels: int | None = None
    codebook_size: int | None = None
    codebook_embed_dim: int | None = None
    codebook_l2_norm: bool | None = None
    commit_loss_beta: float | None = None
    entropy_loss_ratio: float | None = None
    usage_window: int | None = None
    num_groups: int | None = None
    dropout: float | None = None
    patch_size: int | None = None


@dataclass(frozen=True)
class StartConfig:
    """Where the weights come from. model: a VQModel folder of the same shape (None: fresh weights); freeze_codes: train the
    decoder alone, so that the codes of every picture stay what they are and cached tokens and generators stay valid.
    """

    model: str | None = None
    freeze_codes: bool = False


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms. perceptual: `lpips` needs its two files; `pyramid` is the substitute for machines without them.

    disc_start: first step (from 1) with GAN terms; past the last step: none at all. restart_every: steps between revivals of unused codes
    (0: never), up to the share `restart_until` of the run.
    """

    reconstruction: str = "l2"
    reconstruction_weight: float = 1.0
    perceptual: str = "pyramid"
    perceptual_weight: float = 1.0
    lpips_vgg: str | None = None
    lpips_heads: str | None = None
    disc: str = "hinge"
    gen: str = "hinge"
    disc_weight: float = 0.5
    disc_start: int = 20000
    disc_adaptive_weight: bool = False
    disc_width: int = 64
    disc_layers: int = 3
    restart_every: int = 0
    restart_until: float = 0.7


@dataclass(frozen=True)
class Config(TrainConfig):
    """`system: vq_tokenizer`."""

    data: DataConfig = field(default_factory=lambda: DataConfig(path=""))
    model: ModelConfig = field(default_factory=ModelConfig)
    start: StartConfig = field(default_factory=StartConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: OptimizerConfig = field(default_factory=OptimizerConfig)


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work, before pictures or weights are loaded."""
    data, loss = config.data, config.loss
    require(bool(data.path), "data.path must name a dataset folder")
    require(
        Path(data.path).exists(),
        f"data.path {data.path} does not exist; `vgen data emoji --out data/emoji` builds the emoji set",
    )
    require_positive(data, "size", prefix="data.")
    require_share(data, "flip", prefix="data.")
    require(0 < data.min_scale <= 1, f"data.min_scale must lie in (0, 1], found {data.min_scale}")
    require_not_negative(data, "workers", prefix="data.")
    with torch.device("meta"):
        model = make_model(config)  # raises for impossible sizes
    model.spec.grid(data.size, data.size)
    weights = (
        "reconstruction_weight",
        "perceptual_weight",
        "disc_weight",
        "disc_start",
        "restart_every",
        "restart_until",
    )
    require_not_negative(loss, *weights, prefix="loss.")
    require_positive(loss, "disc_width", "disc_layers", prefix="loss.")
    require_choice("loss.reconstruction", loss.reconstruction, RECONSTRUCTION_LOSSES)
    require_choice("loss.perceptual", loss.perceptual, PERCEPTUAL)
    require_choice("loss.disc", loss.disc, DISCRIMINATOR_LOSSES)
    require_choice("loss.gen", loss.gen, GENERATOR_LOSSES)
    check_optimizer(config.discriminator, "discriminator.")
    if loss.perceptual == "lpips":
        for name in ("lpips_vgg", "lpips_heads"):
            path = getattr(loss, name)
            require(
                bool(path) and Path(path).is_file(), f"loss.perceptual=lpips needs the file loss.{name}, found {path}"
            )
    if config.start.model is not None:
        path = Path(config.start.model) / SAFETENSORS_WEIGHTS_NAME
        require(path.is_file(), f"start.model: {path} does not exist; expected a folder written by `vgen train`")
    if config.start.freeze_codes:
        require(config.start.model is not None, "start.freeze_codes keeps the codes of start.model, which is not set")
        require(loss.restart_every == 0, "start.freeze_codes and loss.restart_every contradict each other; set it to 0")
    least = 8 * 2**2
    require(
        loss.perceptual != "pyramid" or data.size >= least,
        f"loss.perceptual=pyramid needs data.size >= {least}, found {data.size}",
    )


def make_model(config: Config) -> VQModel:
    """A VQModel with fresh weights."""
    changes = {key: value for key, value in asdict(config.model).items() if key != "size" and value is not None}
    return VQModel.of_size(config.model.size, **changes)


def started_model(config: Config) -> VQModel:
    """The model that training begins with: fresh, or `start.model`, with the coding half frozen where asked."""
    model = make_model(config)
    if config.start.model is not None:
        load_exactly(model, read_state_dict(Path(config.start.model) / SAFETENSORS_WEIGHTS_NAME))
    if config.start.freeze_codes:
        for part in (model.encoder, model.quant_conv, model.quantize):
            part.requires_grad_(False)
    return model


def build(config: Config, device: torch.device) -> VQTokenizerSystem:
    """Opens the data and makes the networks."""
    return VQTokenizerSystem(config, device)


class Critic(nn.Module):
    """The discriminator's objective as one forward pass: DDP must see exactly one forward per backward."""

    def __init__(self, objective: VQLoss):
        super().__init__()
        self.objective = objective

    def forward(self, pixels: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """The discriminator's terms at `step` (from 1)."""
        return self.objective.discriminate(pixels, reconstruction, step)


class VQTokenizerSystem:
    """Autoencoder and discriminator, alternating on the same reconstructions."""

    averaged: Sequence[str] = ("tokenizer",)
    items = "images"
    score = ("psnr", 1)

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        data, loss = config.data, config.loss
        augment = Augment(min_scale=data.min_scale, flip=data.flip)
        self.train_images = open_images(
            data.path, data.train_split, data.size, augment, seed=config.seed, cache=data.cache
        )
        self.held_out = open_images(data.path, data.held_out_split, data.size, cache=data.cache)
        self.model = started_model(config)
        discriminator = PatchDiscriminator(width=loss.disc_width, layers=loss.disc_layers)
        options = {
            "reconstruction_loss": loss.reconstruction,
            "reconstruction_weight": loss.reconstruction_weight,
            "perceptual_weight": loss.perceptual_weight,
            "disc_loss": loss.disc,
            "gen_loss": loss.gen,
            "disc_weight": loss.disc_weight,
            "disc_start": loss.disc_start,
            "disc_adaptive_weight": loss.disc_adaptive_weight,
        }
        # Two views of one discriminator: the critic is what checkpoints hold, so the frozen perceptual weights stay out of it.
        self.objective = VQLoss(discriminator, _perceptual(loss), **options).to(device)
        self.networks: dict[str, nn.Module] = {"tokenizer": self.model}
        self.optimizers = {"tokenizer": config.optimizer}
        if self.objective.adversarial(config.steps):
            self.networks["discriminator"] = Critic(VQLoss(discriminator, None, **options))
            self.optimizers["discriminator"] = config.discriminator
        self.latest: Tensor | None = None  # pictures of the step at hand, for reviving codes

    def batches(self, start: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        """Endless training pictures."""
        config = self.config
        return batches(self.train_images, config.batch_size, config.seed, start, rank, world, config.data.workers)

    def losses(self, batch: dict[str, Any], step: int, generator: Generator) -> Iterator[Loss]:
        """The autoencoder's objective, then the discriminator's on the detached reconstruction of the same forward."""
        pixels = self.latest = batch["image"]
        output = self.networks["tokenizer"](pixels)
        with autocast(self.config, pixels.device):
            terms = self.objective.generator(
                pixels, output.reconstruction, output.quantized, step + 1, last_layer=self.model.last_layer
            )
        value = terms.pop("loss")
        yield Loss("tokenizer", value, {**terms, "usage": output.quantized.usage})
        if "discriminator" in self.networks and self.objective.adversarial(step + 1):
            terms = self.networks["discriminator"](pixels, output.reconstruction.detach(), step + 1)
            value = terms.pop("loss")
            yield Loss("discriminator", value, terms)

    @torch.no_grad()
    def after_step(self, step: int, generator: Generator, averages: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Revives unused codes and says when the codebook has collapsed."""
        config, quantizer, messages = self.config, self.model.quantize, []
        done, every = step + 1, config.loss.restart_every
        window = quantizer.codebook_used.numel()
        seen = done * config.accumulate * self.latest.shape[0] * self._tokens_per_image()
        if every and done % every == 0 and done <= config.loss.restart_until * config.steps and seen >= window:
            messages += self._revive(averages.get("tokenizer", {}))
        # Every codebook looks collapsed in its first steps; what counts is whether it recovers.
        started = done >= 0.1 * config.steps
        if started and done % config.log_every == 0 and (collapse := quantizer.collapsed()):
            messages.append(f"warning: {collapse}")
        return messages

    def _revive(self, average: Mapping[str, Tensor]) -> list[str]:
        quantizer, weight = self.model.quantize, self.model.quantize.embedding.weight
        before = weight.clone()
        with autocast(self.config, weight.device):
            features = self.model.features(self.latest)
        rows = features.float().movedim(1, -1).flatten(0, -2)
        # torch's global generator is seeded for this step on every process, so a resumed run revives the same codes.
        count = quantizer.restart_dead_codes(rows)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(weight, 0)  # features differ between processes, weights must not
        changed = (weight != before).any(dim=1)
        if "quantize.embedding.weight" in average:
            average["quantize.embedding.weight"][changed] = weight[changed].float()
        return [f"revived {count} unused codes of {quantizer.codes}"] if count else []

    def _tokens_per_image(self) -> int:
        grid = self.model.spec.grid(self.config.data.size, self.config.data.size)
        return grid[0] * grid[1] * grid[2]

    def preview(self, step: int) -> Image.Image:
        """Eight held-out pictures over their reconstructions, and eight training pictures over theirs."""
        images = []
        for dataset in (self.held_out, self.train_images):
            pixels = torch.stack([dataset[i]["image"] for i in spread(len(dataset), 8)]).to(self.device)
            images += to_images(pixels) + to_images(self.model(pixels).reconstruction)
        return sheet(images, columns=8, scale=max(1, 128 // self.config.data.size))

    def evaluate(self, step: int) -> dict[str, float]:
        """PSNR (dB) and SSIM on all held-out pictures, code usage there, and PSNR on as many training pictures."""
        held_out = self._measure(self.held_out, range(len(self.held_out)))
        train = self._measure(self.train_images, spread(len(self.train_images), len(self.held_out)))
        counts = torch.bincount(held_out["codes"], minlength=self.model.spec.vocabulary).double()
        perplexity = torch.special.entr(counts / counts.sum()).sum().exp()
        return {
            "psnr": held_out["psnr"].mean().item(),
            "ssim": held_out["ssim"].mean().item(),
            "codes_used": float((counts > 0).sum()),
            "code_perplexity": perplexity.item(),
            "psnr_train": train["psnr"].mean().item(),
        }

    def _measure(self, dataset: Any, indices: Sequence[int], chunk: int = 32) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "codes": []}
        indices = list(indices)
        for start in range(0, len(indices), chunk):
            pixels = torch.stack([dataset[i]["image"] for i in indices[start : start + chunk]]).to(self.device)
            output = self.model(pixels)
            real, made = to_uint8(pixels), to_uint8(output.reconstruction)
            found["psnr"].append(psnr(real, made))
            found["ssim"].append(ssim(real, made))
            found["codes"].append(output.quantized.indices.flatten())
        return {key: torch.cat(values) for key, values in found.items()}

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
        """A VQModel folder."""
        model = make_model(self.config)
        model.load_state_dict(weights["tokenizer"])
        to_dtype(model, dtype).save_pretrained(folder)


def _perceptual(loss: LossConfig) -> nn.Module | None:
    if loss.perceptual == "lpips":
        return LPIPS.from_files(loss.lpips_vgg, loss.lpips_heads)
    return PyramidLoss() if loss.perceptual == "pyramid" else None
