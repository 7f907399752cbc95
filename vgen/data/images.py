"""From the bytes of a picture to a training image: decoding, shrinking, cropping, scaling to [-1, 1]."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

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


def shrink(image: Tensor, size: int, augment: Augment | None) -> Tensor:
    """Reduces a uint8 `[3, H, W]` to what `view` needs at most: this is what a cache keeps."""
    keep = size if augment is None else math.ceil(size / augment.min_scale)
    height, width = image.shape[-2:]
    short = min(height, width)
    if short <= keep:
        return image
    shape = [max(keep, round(side * keep / short)) for side in (height, width)]
    return F.resize(image, shape, InterpolationMode.BICUBIC, antialias=True)


def view(image: Tensor, size: int, augment: Augment | None, generator: torch.Generator | None) -> Tensor:
    """A square view of a uint8 `[3, H, W]` -> float32 `[3, size, size]` in [-1, 1].

    Without `augment` the centre square; with it a random square (and flip) drawn from `generator` alone.
    """
    height, width = image.shape[-2:]
    short = min(height, width)
    if augment is None:
        side, top, left, flip = short, (height - short) // 2, (width - short) // 2, False
    else:
        scale, y, x, coin = torch.rand(4, generator=generator).tolist()
        side = max(1, round(short * (augment.min_scale + (1 - augment.min_scale) * scale)))
        top, left = int(y * (height - side + 1)), int(x * (width - side + 1))
        flip = coin < augment.flip
    # Cropping before resizing gives the pixels of "resize the short side, crop the centre" without a huge middle step for 1 x N pictures.
    image = F.crop(image, top, left, side, side)
    if side != size:
        image = F.resize(image, [size, size], InterpolationMode.BICUBIC, antialias=True)
    if flip:
        image = F.horizontal_flip(image)
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), mean=[0.5] * 3, std=[0.5] * 3)


def item_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The random numbers of one item: the same for any process, worker or batch that asks for (seed, epoch, index)."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
