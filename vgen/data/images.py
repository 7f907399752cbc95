"""From the bytes of a picture to a training image: decoding, shrinking, cropping, scaling to [-1, 1]."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vgen.data.text import BadFile
from vgen.errors import VgenError
from vgen.layers.pictures import Picture, open_picture


@dataclass(frozen=True)
class Augment:
    """Random views of a picture.

    flip: probability of a left-right flip; set 0 when captions say "left" and "right" or pictures hold text.
    min_scale: smallest side of the square crop, as a share of the short side (0 to 1]; 1 keeps the short side whole.
    """

    flip: float = 0.5
    min_scale: float = 0.8


def read_image(source: Picture) -> Tensor:
    """Any picture (`vgen.layers.pictures`) -> uint8 `[3, H, W]`. Raises VgenError."""
    return F.pil_to_tensor(open_picture(source))


def decode_image(contents: bytes) -> Tensor:
    """`read_image` of the bytes of a dataset's file. Raises BadFile."""
    try:
        return read_image(contents)
    except VgenError as error:
        raise BadFile(str(error)) from error


def shrink(image: Tensor, size: int | tuple[int, int], augment: Augment | None) -> Tensor:
    """Reduces a uint8 `[3, H, W]` to what `view` needs at most: this is what a cache keeps."""
    keep = [side if augment is None else math.ceil(side / augment.min_scale) for side in both_sides(size)]
    factor = max(Fraction(wanted, side) for wanted, side in zip(keep, image.shape[-2:]))
    if factor >= 1:
        return image
    shape = [max(wanted, round(side * factor)) for wanted, side in zip(keep, image.shape[-2:])]
    return F.resize(image, shape, InterpolationMode.BICUBIC, antialias=True)


def view(
    image: Tensor, size: int | tuple[int, int], augment: Augment | None, generator: torch.Generator | None
) -> Tensor:
    """A view of a uint8 `[3, h, w]` -> float32 `[3, H, W]` in [-1, 1]; size: (H, W), or the side of a square.

    Without `augment` the largest part of that shape around the centre; with it a random part (and flip) drawn from `generator` alone.
    """
    wanted = both_sides(size)
    height, width = image.shape[-2:]
    factor = min(Fraction(height, wanted[0]), Fraction(width, wanted[1]))  # the largest part: exact, so a square is one
    if augment is None:
        rows, columns = (max(1, round(side * factor)) for side in wanted)
        top, left, flip = (height - rows) // 2, (width - columns) // 2, False
    else:
        scale, y, x, coin = torch.rand(4, generator=generator).tolist()
        share = augment.min_scale + (1 - augment.min_scale) * scale
        rows, columns = (max(1, round(float(side * factor) * share)) for side in wanted)
        top, left = int(y * (height - rows + 1)), int(x * (width - columns + 1))
        flip = coin < augment.flip
    # Cropping before resizing gives the pixels of "resize, crop the centre" without a huge middle step for 1 x N pictures.
    image = F.crop(image, top, left, rows, columns)
    if (rows, columns) != wanted:
        image = F.resize(image, list(wanted), InterpolationMode.BICUBIC, antialias=True)
    if flip:
        image = F.horizontal_flip(image)
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), mean=[0.5] * 3, std=[0.5] * 3)


def both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be the side of a square."""
    return (size, size) if isinstance(size, int) else size


def item_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The random numbers of one item: the same for any process, worker or batch that asks for (seed, epoch, index)."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
