"""Between pixel tensors in [-1, 1] and PIL images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] -> B RGB images; values outside are clipped, rounded to the nearest of 256 levels."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def to_pixels(image: Image.Image) -> Tensor:
    """An image -> [3, H, W] in [-1, 1]; transparency is laid on white."""
    array = np.asarray(to_rgb(image), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """An image -> the centre of it as RGB, size x size: the short side resized to `size` (Pillow's bicubic), then cropped.

    Rounding as in torchvision's Resize and CenterCrop: the long side is cut off, the offset rounded.
    """
    image = to_rgb(image)
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB: transparency is laid on white, 16-bit and float grey are scaled (Pillow's convert would clip them)."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_bytes(np.asarray(image), image.mode))
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image)
        image = page
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """16-bit grey ("I;16…", and "I" as 16-bit files are opened) and float grey to 8 bits."""
    if mode == "F":
        values = values * (255.0 if np.nanmax(values) <= 1 else 1.0)
    else:
        values = values / 257.0
    return np.nan_to_num(values).round().clip(0, 255).astype(np.uint8)
