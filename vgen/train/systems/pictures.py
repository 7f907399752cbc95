"""What systems that train on pictures share: data, previews, held-out figures, and models named in a config."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate import PartialState
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from vgen.data.batches import batches
from vgen.data.dataset import ImageDataset, open_images
from vgen.data.heldout import AUTO
from vgen.data.images import Augment
from vgen.data.sources import HELD_OUT_SPLIT, open_data, splits_of
from vgen.data.splits import find_split, held_out_among, layout
from vgen.errors import VgenError
from vgen.layers.pixels import to_images
from vgen.metrics import psnr, ssim
from vgen.settings import merge, require, require_choice, require_not_negative, require_positive, require_share
from vgen.tokenizers_vis.base import to_uint8
from vgen.tokenizers_vis.registry import tokenizer_class
from vgen.train.config import TrainConfig
from vgen.train.system import spread, to_dtype
from vgen.train.systems.latents import latent_kind
from vgen.viz.sheets import sheet


@dataclass(frozen=True)
class DataConfig:
    """path: whatever `open_images` reads; size: side in pixels; min_scale: smallest random crop (share of a side, 1: none);
    flip: share of training pictures that are mirrored; held_out_split: what is measured (None: heldout, else val, … test); held_out: where the data has no split `heldout`, hold out this share ("5%") or
    number ("200") of the training pictures (None: 5% where the data has no other split at all)."""

    path: str
    size: int = 64
    train_split: str = "train"
    held_out_split: str | None = None
    held_out: str | None = None
    min_scale: float = 1.0
    flip: float = 0.5
    workers: int = 0  # loading processes; 0: load between steps
    cache: bool = True  # keep decoded pictures in memory


@dataclass(frozen=True)
class PictureConfig(TrainConfig):
    """Data and model of a tokenizer. family: of `tokenizers_vis.registry`; model: `size`, one of the family's, and whichever
    constructor arguments of its class shall differ from that size.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig(path=""))
    family: str = "vq"
    model: dict[str, Any] = field(default_factory=dict)
    # Text-aware tokenizers (TA-TiTok) read captions through this frozen CLIP, a name or folder of transformers.
    text_encoder: str = "openai/clip-vit-large-patch14-336"


def check_data(data: DataConfig, out: str) -> None:
    """Raises VgenError for data settings that cannot work, before pictures are loaded. out: the run folder."""
    require(bool(data.path), "data.path must name a dataset folder")
    require_positive(data, "size", prefix="data.")
    require_share(data, "flip", prefix="data.")
    require(0 < data.min_scale <= 1, f"data.min_scale must lie in (0, 1], found {data.min_scale}")
    require_not_negative(data, "workers", prefix="data.")
    try:
        splits = splits_of(data.path, _held_out(data))
    except VgenError as error:
        raise VgenError(f"config: data.path: {error}") from error
    find_split(data.train_split, splits, f"config: data.train_split: {data.path}")
    _held_out_split(data, splits)
    run = Path(out).resolve()
    for folder in chain.from_iterable(layout(data.path).parts.values()):
        if folder.is_dir() and run.is_relative_to(folder.resolve()):
            raise VgenError(
                f"config: out={out} lies in {folder}, whose pictures are read: the previews of this run would become data; "
                "choose an out= folder elsewhere"
            )


def _held_out(data: DataConfig) -> str:
    return AUTO if data.held_out is None else data.held_out


def _held_out_split(data: DataConfig, splits: Sequence[str]) -> str:
    """The split that is measured. Raises VgenError where there is none, or not the one that is named."""
    named = data.held_out_split or held_out_among(splits) or HELD_OUT_SPLIT
    return find_split(named, splits, f"config: data.held_out_split: {data.path}")


def open_pictures(data: DataConfig, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """The training pictures, augmented, and the held-out ones, plain; the main process says what was found."""
    found = open_data(data.path, _held_out(data))
    held_out = _held_out_split(data, found.splits)
    if PartialState().is_main_process:
        print(f"{found.report}\n  measured: {held_out}", file=sys.stderr)
    augment = Augment(min_scale=data.min_scale, flip=data.flip)
    train = open_images(found, data.train_split, data.size, augment, seed=seed, cache=data.cache)
    return train, open_images(found, held_out, data.size, cache=data.cache)


def picture_digests(data: DataConfig, train: ImageDataset, held_out: ImageDataset) -> dict[str, str]:
    """What a run learns from and is measured on -> its digest (`System.data_digests`)."""
    names = (data.train_split, _held_out_split(data, splits_of(data.path, _held_out(data))))
    return {f"{data.path} ({name})": pictures.digest for name, pictures in zip(names, (train, held_out))}


def missing(config: Any) -> list[str]:
    """The data that the config names, where it is not there yet (a pattern of shards is not looked for)."""
    path = config.data.path
    return [] if set("*?[{") & set(path) or Path(path).exists() else [path]


def check_pictures(config: PictureConfig, families: Sequence[str]) -> ModelMixin:
    """Raises VgenError for data and model settings that cannot work, before pictures or weights are loaded.

    Returns the model on the meta device.
    """
    check_data(config.data, config.out)
    require_choice("family", config.family, families)
    with torch.device("meta"):
        model = make_model(config)  # raises for impossible sizes
    model.spec.grid(config.data.size, config.data.size)
    return model


def check_restarts(loss: Any, model: ModelMixin) -> None:
    """Raises VgenError for a revival of unused codes that cannot work with this tokenizer."""
    require_not_negative(loss, "restart_every", "restart_until", prefix="loss.")
    require(
        loss.restart_every == 0 or model.config.get("usage_window", 0) > 0,
        "loss.restart_every needs to know which codes are unused: set model.usage_window (65536, say) of a tokenizer with a codebook",
    )


def make_model(config: PictureConfig) -> ModelMixin:
    """A tokenizer of the config's family and size with fresh weights."""
    kind = tokenizer_class(config.family)
    changes = model_settings(kind, config.model)
    return kind.of_size(changes.pop("size"), **changes)


def model_settings(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under `model:` after checking names and types against the constructor of `kind`."""
    require(given.get("size") is not None, f"model.size must be set: one of those of {kind.__name__}")
    hints = get_type_hints(kind.__init__)
    listed = {Sequence[int]: list[int]}  # what YAML calls a sequence
    arguments = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    settings = [(name, listed.get(hints[name], hints[name]) | None, field(default=None)) for name in arguments]
    group = make_dataclass("Settings", [("size", str | None, None), *settings], frozen=True)
    schema = make_dataclass("ModelConfig", [("model", group, field(default_factory=group))], frozen=True)
    merged = asdict(merge(schema, {"model": dict(given)}).model)
    return {name: value for name, value in merged.items() if value is not None}


class PictureSystem:
    """One tokenizer, "tokenizer" among the networks, and the pictures it learns from. Subclasses add objectives."""

    averaged: Sequence[str] = ("tokenizer",)
    items = "images"

    def __init__(self, config: PictureConfig, device: torch.device, model: ModelMixin):
        self.config, self.device, self.model = config, device, model
        self.latent = latent_kind(config, model)
        self.train_images, self.held_out = open_pictures(config.data, config.seed)
        self.captions = _text_encoder(config, device) if getattr(model.config, "text_tokens", 0) else None

    def data_digests(self) -> dict[str, str]:
        """Of the pictures of both splits."""
        return picture_digests(self.config.data, self.train_images, self.held_out)

    def batches(self, start: int, rank: int, world: int) -> Iterator[dict[str, Any]]:
        """Endless training pictures."""
        config = self.config
        return batches(self.train_images, config.batch_size, config.seed, start, rank, world, config.data.workers)

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The argument `condition` of a text-aware tokenizer, nothing for the others."""
        return {} if self.captions is None else {"condition": self.captions.captions(captions).extras["decoder_text"]}

    def preview(self, step: int) -> Image.Image:
        """Eight held-out pictures over their reconstructions, and eight training pictures over theirs."""
        images = []
        for dataset in (self.held_out, self.train_images):
            pixels, output = self._forward(dataset, spread(len(dataset), 8))
            images += to_images(pixels) + to_images(output.reconstruction)
        return sheet(images, columns=8, scale=max(1, 128 // self.config.data.size))

    def evaluate(self, step: int) -> dict[str, float]:
        """PSNR (dB) and SSIM on all held-out pictures, figures of the latent there, and PSNR on as many training pictures."""
        held_out, latents = self._measure(self.held_out, range(len(self.held_out)))
        train, _ = self._measure(self.train_images, spread(len(self.train_images), len(self.held_out)))
        return {**held_out, **self.latent.figures(latents), "psnr_train": train["psnr"]}

    def _measure(self, dataset: ImageDataset, indices: Sequence[int], chunk: int = 32) -> tuple[dict[str, float], list]:
        """Mean PSNR and SSIM of pictures, and what `latent.record` keeps of them."""
        quality: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
        latents = []
        for start in range(0, len(indices), chunk):
            pixels, output = self._forward(dataset, indices[start : start + chunk])
            real, made = to_uint8(pixels), to_uint8(output.reconstruction)
            quality["psnr"].append(psnr(real, made))
            quality["ssim"].append(ssim(real, made))
            latents.append(self.latent.record(output))
        return {key: torch.cat(values).mean().item() for key, values in quality.items()}, latents

    def _forward(self, dataset: ImageDataset, indices: Sequence[int]) -> tuple[Tensor, Any]:
        items = [dataset[i] for i in indices]
        pixels = torch.stack([item["image"] for item in items]).to(self.device)
        return pixels, self.model(pixels, **self.text([item["caption"] for item in items]))

    def save_model(self, folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Writes the tokenizer with these weights, a continuous one with the scale of its latents."""
        model = make_model(self.config)
        model.load_state_dict(weights)
        pictures = torch.stack([self.train_images[i]["image"] for i in spread(len(self.train_images), 64)])
        self.latent.finish(model.to(self.device), pictures.to(self.device))
        to_dtype(model, dtype).save_pretrained(folder)


def _text_encoder(config: PictureConfig, device: torch.device) -> Any:
    from vgen.models.conditions.clip import ClipCaptions

    captions = ClipCaptions.from_pretrained(config.text_encoder)
    captions.encoder.to(device)
    return captions
