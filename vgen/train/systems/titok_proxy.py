"""Stage 1 of the first TiTok models: predict MaskGIT-VQGAN's codes of a picture from N latents (arXiv 2406.07550, section 3.3).

The exported model has the VQGAN's decoder as its pixel half. Stage 2 trains that together with the transformer decoder:
`system: tokenizer`, `family: titok_legacy`, with `start.model` (this system's model) and `start.freeze_codes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from vgen.data.identity import weights_digest
from vgen.files import sha256
from vgen.settings import require
from vgen.tokenizers_vis.maskgit_vqgan import MaskGITVQGAN
from vgen.tokenizers_vis.registry import find_tokenizer, open_tokenizer
from vgen.tokenizers_vis.titok.legacy import TiTokLegacy, pixel_half, proxy_loss
from vgen.train.system import Loss
from vgen.train.systems.pictures import PictureConfig, PictureSystem, check_pictures, check_restarts, make_model
from vgen.train.systems.pictures import missing as missing_data


@dataclass(frozen=True)
class ProxyLossConfig:
    """restart_every: steps between revivals of unused codes (0: never), up to the share `restart_until` of the run."""

    restart_every: int = 0
    restart_until: float = 0.7


@dataclass(frozen=True)
class Config(PictureConfig):
    """`system: titok_proxy`. proxy: the MaskGIT-VQGAN, as the published file or a saved folder; model: sizes of the transformers (its
    pixel half has the VQGAN's).
    """

    family: str = "titok_legacy"
    proxy: str = ""
    loss: ProxyLossConfig = field(default_factory=ProxyLossConfig)


def check(config: Config) -> None:
    """Raises VgenError for settings that cannot work; the VQGAN is opened, because the model's sizes follow from it."""
    require(
        bool(config.proxy),
        "proxy must name the MaskGIT-VQGAN whose codes are predicted: the published file or a folder",
    )
    check_restarts(config.loss, check_pictures(with_pixel_half(config, open_proxy(config)), ("titok_legacy",)))


def open_proxy(config: Config) -> MaskGITVQGAN:
    """The frozen VQGAN. Raises VgenError when it is missing or something else."""
    path = Path(config.proxy)
    require(
        path.exists(),
        f"proxy: {path} does not exist; name the published file, or a folder of `vgen train maskgit/vqgan`",
    )
    proxy = open_tokenizer(find_tokenizer(path)) if path.is_dir() else MaskGITVQGAN.from_single_file(path)
    require(isinstance(proxy, MaskGITVQGAN), f"proxy: {path} holds a {type(proxy).__name__}, expected a MaskGITVQGAN")
    return proxy.requires_grad_(False)


def with_pixel_half(config: Config, proxy: MaskGITVQGAN) -> Config:
    """The config whose model has the sizes of the VQGAN where they must agree."""
    sizes = {
        "decoder_patch_size": proxy.spec.downsample[1],
        "proxy_codes": proxy.config.num_embeddings,
        "pixel_width": proxy.config.hidden_channels,
        "pixel_mult": list(proxy.config.channel_mult),
        "pixel_blocks": proxy.config.num_res_blocks,
        "pixel_channels": proxy.config.z_channels,
        "num_groups": proxy.config.num_groups,
    }
    return dataclasses.replace(config, model={**config.model, **sizes})


def missing(config: Config) -> list[str]:
    """What the config names and is not there yet."""
    return [*missing_data(config), *([] if Path(config.proxy).exists() else [config.proxy])]


def sketch(config: Config) -> dict[str, nn.Module]:
    """The network on the meta device, for a VQGAN of the published size; nothing is opened."""
    with torch.device("meta"):
        return {"tokenizer": make_model(with_pixel_half(config, MaskGITVQGAN()))}


def build(config: Config, device: torch.device) -> ProxySystem:
    """Opens data and VQGAN and makes the model."""
    return ProxySystem(config, device)


class ProxyObjective(nn.Module):
    """The objective as a forward pass: what DDP hooks on to."""

    def __init__(self, model: TiTokLegacy):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Pictures [B, 3, H, W] and the VQGAN's codes of them [B, g*g] -> loss and figures."""
        quantized = self.model.quantize(self.model.features(pixels))
        terms = proxy_loss(self.model.decoder(quantized.quantized), codes, quantized)
        return terms if quantized.usage is None else {**terms, "usage": quantized.usage}


class ProxySystem(PictureSystem):
    """Encoder, codebook and transformer decoder; the pixel half is there for previews and export, and does not train."""

    score = ("cross_entropy", -1)

    def __init__(self, config: Config, device: torch.device):
        proxy = open_proxy(config)
        config = with_pixel_half(config, proxy)
        model = make_model(config)
        model.load_state_dict({**model.state_dict(), **pixel_half(proxy.state_dict())})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith("pixel_"))
        super().__init__(config, device, model)
        self.proxy = proxy.to(device)
        self.networks: dict[str, nn.Module] = {"tokenizer": ProxyObjective(model)}
        self.optimizers = {"tokenizer": config.optimizer}
        self.latest: Tensor | None = None  # pictures of the step at hand, for reviving codes

    def data_digests(self) -> dict[str, str]:
        """Of the pictures, and of the VQGAN whose codes are learned."""
        path = Path(self.config.proxy)
        proxy = weights_digest(find_tokenizer(path)) if path.is_dir() else sha256(path)
        return {**super().data_digests(), f"proxy {path}": proxy}

    def losses(self, batch: dict[str, Any], step: int, generator: Generator) -> Iterator[Loss]:
        """Cross-entropy against the VQGAN's codes of the same pictures, and the quantizer's losses."""
        pixels = self.latest = batch["image"]
        terms = dict(self.networks["tokenizer"](pixels, self._codes(pixels)))
        yield Loss("tokenizer", terms.pop("loss"), terms)

    @torch.no_grad()
    def _codes(self, pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, enabled=False):  # in bf16 other codes would be nearest
            return self.proxy.encode(pixels)

    def after_step(self, step: int, generator: Generator, averages: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
        """Revives unused codes and says when the codebook has collapsed."""
        average = {name.removeprefix("model."): value for name, value in averages.get("tokenizer", {}).items()}
        return self.latent.after_step(step, self.latest, average)

    def evaluate(self, step: int) -> dict[str, float]:
        """As `PictureSystem`, with cross-entropy (nats a patch) and accuracy on held-out pictures."""
        found: dict[str, list[Tensor]] = {"cross_entropy": [], "accuracy": []}
        for start in range(0, len(self.held_out), 32):
            rows = range(start, min(start + 32, len(self.held_out)))
            pixels = torch.stack([self.held_out[i]["image"] for i in rows]).to(self.device)
            vectors = self.model.quantize(self.model.features(pixels)).quantized
            logits, codes = self.model.decoder(vectors).float().flatten(2), self._codes(pixels)
            found["cross_entropy"].append(nn.functional.cross_entropy(logits, codes, reduction="none").flatten())
            found["accuracy"].append((logits.argmax(dim=1) == codes).float().flatten())
        return {name: torch.cat(values).mean().item() for name, values in found.items()} | super().evaluate(step)

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
        """A TiTokLegacy folder."""
        named = {name.removeprefix("model."): value for name, value in weights["tokenizer"].items()}
        self.save_model(folder, named, dtype)
