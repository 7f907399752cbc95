"""Training a FlexTok on pictures: the velocity of a rectified flow under a random number of tokens (arXiv 2502.13967)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Generator, Tensor, nn

from vgen.data.batches import batches
from vgen.metrics import psnr
from vgen.samplers.flow import TIMES, FlowGuidance
from vgen.saved import read_json
from vgen.settings import require, require_choice, require_not_negative, require_positive, require_share
from vgen.tokenizers_vis.base import to_uint8
from vgen.tokenizers_vis.flextok.flextok import FlexTok, token_counts
from vgen.tokenizers_vis.flextok.training import KEEP, FlexTokObjective
from vgen.tokenizers_vis.flextok.vae import FlexTokVAE
from vgen.tokenizers_vis.losses.alignment import Teacher
from vgen.tokenizers_vis.registry import SHIPPED, class_families, find_tokenizer, open_tokenizer
from vgen.train.config import TrainConfig
from vgen.train.seeds import derived_seed
from vgen.train.system import Loss, autocast, spread, to_dtype
from vgen.train.systems.pictures import DataConfig, check_data, open_pictures, picture_digests
from vgen.train.systems.pictures import missing as missing_data
from vgen.viz.strips import token_strip


@dataclass(frozen=True)
class ModelConfig:
    """A named size of `tokenizers_vis.flextok.SIZES`; every other number replaces one of its own when set.

    vae: folder of the frozen VAE below, one of vgen's KL tokenizers or diffusers' AutoencoderKL; None: FlexTok works on
    pixels. vae_scale: of the latents of an AutoencoderKL whose config does not say it.
    """

    size: str = "emoji-f8"
    vae: str | None = None
    vae_scale: float | None = None
    encoder_width: int | None = None
    encoder_depth: int | None = None
    decoder_width: int | None = None
    decoder_depth: int | None = None
    head_dim: int | None = None
    patch_size: int | None = None
    max_grid: list[int] | None = None
    registers: int | None = None
    levels: list[int] | None = None
    frequencies: int | None = None
    max_time: float | None = None


@dataclass(frozen=True)
class LossConfig:
    """keep: how many tokens a sample keeps, a name of `KEEP`; null_dropout: share of samples without any token, which guidance
    needs; times: how times are drawn, a name of `samplers.flow.TIMES`; mode_scale: of `mode`, how much denser times are in the
    middle (0: uniform).

    alignment_model: DINOv2 of transformers (name or folder) whose features the decoder's block 1 is aligned with (None: not at
    all); alignment_weight, alignment_hidden: weight of that term and width of its head; alignment_size: side in pixels.
    """

    keep: str = "pow2"
    null_dropout: float = 0.1
    times: str = "mode"
    mode_scale: float = 0.25
    alignment_model: str | None = None
    alignment_weight: float = 1.0
    alignment_hidden: int = 2048
    alignment_size: int = 518


@dataclass(frozen=True)
class SamplingConfig:
    """guidance, steps: of previews, and defaults of the exported model. counts: numbers of tokens in figures and previews (empty:
    1, 2, 4, … all). evaluate_images, evaluate_steps: how many held-out pictures are decoded, without guidance, for PSNR."""

    guidance: float = 7.5
    steps: int = 25
    counts: list[int] = field(default_factory=list)
    evaluate_images: int = 48
    evaluate_steps: int = 10
    preview_images: int = 6


@dataclass(frozen=True)
class Config(TrainConfig):
    """`system: flextok`."""

    data: DataConfig = field(default_factory=lambda: DataConfig(path=""))
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work; of the VAE only the config is read."""
    data, loss, sampling = config.data, config.loss, config.sampling
    check_data(data, config.out)
    require_choice("loss.keep", loss.keep, KEEP)
    require_choice("loss.times", loss.times, TIMES)
    require_share(loss, "null_dropout", prefix="loss.")
    require_not_negative(loss, "mode_scale", "alignment_weight", prefix="loss.")
    require_positive(loss, "alignment_hidden", "alignment_size", prefix="loss.")
    require_positive(sampling, "steps", "evaluate_images", "evaluate_steps", "preview_images", prefix="sampling.")
    FlowGuidance(sampling.guidance)
    vae = None if config.model.vae is None else open_vae(config)
    with torch.device("meta"):
        model = make_model(config, vae)  # raises for impossible sizes
    model.spec.grid(data.size, data.size)
    most = model.config.registers
    for count in sampling.counts:
        require(1 <= count <= most, f"sampling.counts lie in 1..{most}, the number of registers, found {count}")


def open_vae(config: Config) -> ModelMixin:
    """The frozen VAE that the config names."""
    folder = find_tokenizer(config.model.vae)
    kind = read_json(folder / "config.json").get("_class_name")
    if kind == "AutoencoderKL":
        vae = FlexTokVAE.from_autoencoder(folder, config.model.vae_scale)
    else:
        vae = open_tokenizer(folder)
    return vae.eval().requires_grad_(False)


def make_model(config: Config, vae: ModelMixin | None) -> FlexTok:
    """A FlexTok with fresh weights on the given VAE, which it shares."""
    settings, sampling = config.model, config.sampling
    chosen = {key: value for key, value in asdict(settings).items() if value is not None}
    changes = {key: value for key, value in chosen.items() if key not in ("size", "vae", "vae_scale")}
    changes |= {"guidance": sampling.guidance, "steps": sampling.steps, "vae_family": None}
    if vae is not None:
        options = {name: value for name, value in vae.config.items() if not name.startswith("_")}
        changes |= {"vae_family": class_families()[type(vae).__name__], "vae_options": options}
    model = FlexTok.of_size(settings.size, **changes)
    if vae is not None:
        model.vae = vae
    return model


def missing(config: Config) -> list[str]:
    """What the config names and is not there yet."""
    vae = config.model.vae
    return [*missing_data(config), *([] if vae is None or vae in SHIPPED or Path(vae).exists() else [vae])]


def sketch(config: Config) -> dict[str, nn.Module]:
    """The network on the meta device, without its frozen VAE and heads that follow from a teacher; nothing is opened."""
    with torch.device("meta"):
        return {"flextok": make_model(config, None)}


def build(config: Config, device: torch.device) -> FlexTokSystem:
    """Opens data, VAE and teacher, and makes the networks."""
    return FlexTokSystem(config, device)


class FlexTokSystem:
    """Encoder and decoder, one objective."""

    averaged: Sequence[str] = ("flextok",)
    items = "images"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        loss = config.loss
        self.train_images, self.held_out = open_pictures(config.data, config.seed)
        self.vae = None if config.model.vae is None else open_vae(config).to(device)
        self.model = make_model(config, self.vae)
        self.teacher = None
        if loss.alignment_model is not None:
            self.teacher = Teacher(loss.alignment_model, loss.alignment_size).to(device)
        width = None if self.teacher is None else self.teacher.width
        objective = FlexTokObjective(self.model, width, loss.alignment_weight, loss.alignment_hidden)
        self.networks: dict[str, nn.Module] = {"flextok": objective}
        self.optimizers = {"flextok": config.optimizer}
        self.counts = list(config.sampling.counts) or token_counts(self.model.config.registers)
        self.score = (f"psnr_{self.counts[-1]}", 1)
        self.usage = torch.zeros(self.model.spec.vocabulary, dtype=torch.long, device=device)  # since the last look

    def data_digests(self) -> dict[str, str]:
        """Of the pictures of both splits."""
        return picture_digests(self.config.data, self.train_images, self.held_out)

    def batches(self, start: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        """Endless training pictures."""
        config = self.config
        return batches(self.train_images, config.batch_size, config.seed, start, rank, world, config.data.workers)

    def losses(self, batch: dict[str, Any], step: int, generator: Generator) -> Iterator[Loss]:
        """The flow (and alignment) under fresh noise, times, numbers of tokens and drops."""
        pixels = batch["image"]
        terms = self._terms(pixels, generator)
        tokens = terms.pop("tokens").flatten()
        seen = torch.zeros_like(self.usage).index_add_(0, tokens, torch.ones_like(tokens))
        self.usage += seen
        reachable = min(len(seen), len(tokens))
        yield Loss("flextok", terms.pop("loss"), {**terms, "usage": (seen > 0).sum() / reachable})

    def _terms(self, pixels: Tensor, generator: Generator) -> dict[str, Tensor]:
        """The objective of pictures [B, 3, H, W]; all draws come from the generator."""
        loss, device = self.config.loss, pixels.device
        shape = self.latent_shape(pixels)
        draws = [torch.randn(shape, generator=generator, device=device) for _ in range(2)]
        uniform = torch.rand(3, len(pixels), generator=generator, device=device)
        with torch.no_grad():
            latents = self.model.latents(pixels, draws[0])
            with autocast(self.config, device):
                teacher = None if self.teacher is None else self.teacher(pixels)
        times = TIMES[loss.times](uniform[0], loss.mode_scale)
        keep = KEEP[loss.keep](uniform[1], self.model.config.registers)
        return dict(self.networks["flextok"](latents, draws[1], times, keep, uniform[2] < loss.null_dropout, teacher))

    def latent_shape(self, pixels: Tensor) -> tuple[int, ...]:
        """[B, C, h, w] of the latent maps of pictures."""
        down = self.model.downsample
        return len(pixels), self.model.channels, pixels.shape[2] // down, pixels.shape[3] // down

    def after_step(self, step: int, generator: Generator, averages: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Says, when figures are logged, if the codes have collapsed: far fewer in use than the number of tokens could reach."""
        done = step + 1
        if done % self.config.log_every:
            return []
        counts, self.usage = self.usage.double(), torch.zeros_like(self.usage)
        total, codes = counts.sum(), len(counts)
        perplexity = torch.special.entr(counts / total).sum().exp().item()
        even = codes * -torch.expm1(-total / codes).item()  # codes that evenly spread tokens would reach
        if done < 0.1 * self.config.steps or perplexity >= 0.05 * even:  # few codes are in use in every first step
            return []
        return [
            f"warning: the tokens have collapsed: {int((counts > 0).sum())} of {codes} codes in the last {int(total)} tokens (perplexity "
            f"{perplexity:.1f}); lower the learning rate, lengthen the warm-up, or keep more tokens (loss.keep=uniform)"
        ]

    def preview(self, step: int) -> Image.Image:
        """Held-out pictures from 1, 2, 4, … tokens, with the guidance of `sampling`."""
        indices = spread(len(self.held_out), self.config.sampling.preview_images)
        pixels = self._pixels(self.held_out, indices)
        made = self.model.reconstruct(pixels, self.counts, seed=self.config.seed)
        return token_strip(pixels, made, self.counts, scale=max(1, 96 // self.config.data.size))

    def evaluate(self, step: int) -> dict[str, float]:
        """On held-out pictures: the flow loss and use of codes on all of them, PSNR (dB) from every number of tokens on some.

        Draws are the same at every call, so figures compare along a run.
        """
        settings = self.config.sampling
        generator = torch.Generator(self.device).manual_seed(derived_seed(self.config.seed, "evaluate"))
        flow, usage, everything = 0.0, torch.zeros_like(self.usage), range(len(self.held_out))
        for start in range(0, len(everything), 64):
            terms = self._terms(self._pixels(self.held_out, everything[start : start + 64]), generator)
            tokens = terms["tokens"].flatten()
            usage.index_add_(0, tokens, torch.ones_like(tokens))
            flow += terms["flow"].item() * len(terms["tokens"])
        share = usage.double() / usage.sum()
        figures = {
            "flow": flow / len(everything),
            "codes_used": float((usage > 0).sum()),
            "code_perplexity": torch.special.entr(share).sum().exp().item(),
        }
        pixels = self._pixels(self.held_out, spread(len(self.held_out), settings.evaluate_images))
        made = self.model.reconstruct(
            pixels, self.counts, seed=self.config.seed, steps=settings.evaluate_steps, guidance=1.0
        )
        real = to_uint8(pixels)
        return figures | {
            f"psnr_{count}": psnr(real, to_uint8(part)).mean().item() for count, part in zip(self.counts, made)
        }

    def _pixels(self, dataset: Any, indices: Sequence[int]) -> Tensor:
        return torch.stack([dataset[i]["image"] for i in indices]).to(self.device)

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
        """A FlexTok folder, VAE included."""
        model = make_model(self.config, None if self.config.model.vae is None else open_vae(self.config))
        for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
            prefix = f"{name}."
            part.load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights["flextok"].items() if k.startswith(prefix)}
            )
        to_dtype(model, dtype).save_pretrained(folder)
