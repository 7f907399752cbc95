"""Between pixel tensors in [-1, 1] and PIL images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgen.layers.pictures import to_rgb


def to_images(pixels: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] -> B RGB images; values outside are clipped, rounded to the nearest of 256 levels."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def to_pixels(image: Image.Image) -> Tensor:
    """An image -> [3, H, W] in [-1, 1]; upright, transparency is laid on white."""
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
