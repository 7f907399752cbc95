"""In- and outpainting: which tokens of a picture are known before decoding begins, and how its own pixels come back at the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as T

from vgen.errors import VgenError
from vgen.layers.pictures import Picture
from vgen.pipelines.masks import read_parts
from vgen.samplers.types import Grid
from vgen.values import real, several, whole

log = logging.getLogger("vgen.pipelines")

Margins = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the picture


@dataclass(frozen=True)
class Painting:
    """A picture of which a part stays.

    tokens [N] or [N, C], stays [N] bool: of all levels, coarse first. original: uint8 [3, H, W], the picture on the canvas of the
    finest level; kept: bool [rows, columns], its cells that stay.
    """

    tokens: Tensor
    stays: Tensor
    original: Tensor
    kept: Tensor

    @cached_property
    def weight(self) -> Tensor:
        """[H, W] in [0, 1], how much of the original a finished picture takes back: 0 in cells that were made anew, rising inside
        the border of the kept ones over about half a cell, 1 behind it. Edges of the canvas are no borders."""
        height, width = self.original.shape[-2:]
        rows, columns = self.kept.shape
        cell = (height // rows, width // columns)
        away = [max(1, side // 4) for side in cell]  # twice so many pixels is the seam
        window, padding = [2 * side + 1 for side in away], away
        inside = repeat(self.kept.float(), "r c -> 1 1 (r h) (c w)", h=cell[0], w=cell[1])
        eroded = 1 - F.max_pool2d(1 - inside, window, stride=1, padding=padding)
        return F.avg_pool2d(eroded, window, stride=1, padding=padding, count_include_pad=False)[0, 0]

    def paste(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The finished pictures with the original's pixels in the cells that stayed: exactly those, but for the seam."""
        weight = self.weight[..., None].numpy()
        original = rearrange(self.original, "c h w -> h w c").numpy()
        mixed = (original * weight + np.asarray(image) * (1 - weight) for image in images)
        return [Image.fromarray(values.round().astype(np.uint8)) for values in mixed]


@torch.no_grad()
def read_painting(
    tokenizer: ModelMixin,
    grids: Sequence[Grid],
    image: Picture | None,
    mask: Picture | None = None,
    outpaint: Sequence[float] | None = None,
) -> Painting | None:
    """What is known of a picture: the cells of its token grid that neither the mask's white area nor new margins touch.

    grids: of the levels, coarse first. outpaint: new margins left, top, right and bottom, a whole number in pixels of the picture,
    a float as a share of its side. The grid is the model's, so a canvas that grew is scaled to it, after growing evenly on both
    sides to its shape where needed. Without margins, the centre of a picture of another shape is used, as in datasets. Both is
    said in a warning of the log. None without image, mask and margins. VgenError for what `read_parts` refuses, margins that leave
    nothing of the picture, a mask whose white is cut off with the sides, and tokenizers whose tokens are no places.
    """
    parts = read_parts(image, mask, outpaint)
    if parts is None:
        return None
    if tokenizer.spec.sequence is not None:
        raise VgenError(
            "the tokens of a 1-D tokenizer are no places in the picture, so a mask says nothing about them; use a 2-D tokenizer"
        )
    picture, fresh = parts
    pixels, fresh = T.pil_to_tensor(picture), torch.from_numpy(fresh)
    shapes = [tokenizer.spec.pixels(grid)[1:] for grid in grids]
    margins = None if outpaint is None else _margins(outpaint, picture.size, shapes[-1])
    place = _centre if margins is None else _outside
    levels = []
    for grid, shape in zip(grids, shapes):
        canvas, new = place(pixels, fresh, shape, margins)
        cells = rearrange(new, "(r h) (c w) -> r c (h w)", r=grid[1], c=grid[2])
        levels.append((tokenizer.encode(_scaled(canvas, tokenizer))[0], ~cells.any(dim=-1), canvas))
    kept = levels[-1][1]
    stays = torch.cat([level[1].flatten() for level in levels])
    if stays.all():
        raise VgenError(
            "the mask has no white area in the centre of the init image, which is all that is used of it; make it white there"
            if outpaint is None
            else "the margins add nothing to the init image, so there is nothing to make; give at least one that is not 0"
        )
    if outpaint is not None and not kept.any():
        raise VgenError(
            "nothing of the init image would stay: its mask and margins touch every cell of the model's grid; give smaller margins"
        )
    if margins is None:
        _say_crop(pixels, shapes[-1])
    tokens = torch.cat([level[0] for level in levels])
    return Painting(tokens, stays.to(tokens.device), levels[-1][2], kept)


def _scaled(canvas: Tensor, tokenizer: ModelMixin) -> Tensor:
    """uint8 [3, H, W] -> [1, 3, H, W] in [-1, 1], as the tokenizer takes it."""
    return (canvas[None].float() / 127.5 - 1).to(tokenizer.device, tokenizer.dtype)


def _centre_box(pixels: Tensor, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest centred part of a picture that has the shape's ratio of sides."""
    (height, width), (rows, columns) = pixels.shape[-2:], shape
    if width * rows > height * columns:
        inner = height, max(1, round(height * columns / rows))
    else:
        inner = max(1, round(width * rows / columns)), width
    return (height - inner[0]) // 2, (width - inner[1]) // 2, *inner


def _centre(pixels: Tensor, fresh: Tensor, shape: tuple[int, int], _: None) -> tuple[Tensor, Tensor]:
    """The centre of a picture and of what is new in it, both of this shape."""
    box = _centre_box(pixels, shape)
    return _resized(T.crop(pixels, *box), T.crop(fresh, *box), shape)


def _outside(pixels: Tensor, fresh: Tensor, shape: tuple[int, int], margins: Margins) -> tuple[Tensor, Tensor]:
    """A picture inside a canvas of this shape, and what is new on it. The margins repeat the picture's edge, for the encoder."""
    left, top, right, bottom = margins
    height, width = pixels.shape[-2:]
    scale = shape[1] / (left + width + right), shape[0] / (top + height + bottom)
    x0, x1 = (round(x * scale[0]) for x in (left, left + width))
    y0, y1 = (round(y * scale[1]) for y in (top, top + height))
    x0, y0 = min(x0, shape[1] - 1), min(y0, shape[0] - 1)
    small, touched = _resized(pixels, fresh, (max(1, y1 - y0), max(1, x1 - x0)))
    around = [x0, y0, shape[1] - x0 - small.shape[2], shape[0] - y0 - small.shape[1]]
    return T.pad(small, around, padding_mode="edge"), T.pad(touched[None], around, fill=1)[0]


def _resized(pixels: Tensor, fresh: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A pixel is new where any of what it is made of is."""
    if pixels.shape[-2:] != shape:
        pixels = T.resize(pixels, list(shape), InterpolationMode.BICUBIC, antialias=True)
    return pixels, F.adaptive_max_pool2d(fresh[None].float(), shape)[0] > 0


def _margins(outpaint: Sequence[float], size: tuple[int, int], shape: tuple[int, int]) -> Margins:
    """Margins in pixels of the picture (of size width, height), with what the canvas still lacks to the shape's ratio of sides."""
    sides = several(outpaint, "the margins of outpainting (left, top, right, bottom)")
    if len(sides) != 4:
        raise VgenError(f"outpainting takes four margins (left, top, right, bottom), got {len(sides)}")
    left, top, right, bottom = (
        round(real(side, "a margin", 0) * size[i % 2])
        if isinstance(side, (float, np.floating))
        else whole(side, "a margin", 0)
        for i, side in enumerate(sides)
    )
    width, height = size[0] + left + right, size[1] + top + bottom
    wider = max(0, math.ceil(height * shape[1] / shape[0]) - width)
    higher = 0 if wider else max(0, math.ceil(width * shape[0] / shape[1]) - height)
    if wider or higher:
        log.warning(
            "the canvas of %dx%d pixels grows to %dx%d, evenly on both sides, which is the shape of the model's pictures",
            *(width, height, width + wider, height + higher),
        )
    return left + wider // 2, top + higher // 2, right + wider - wider // 2, bottom + higher - higher // 2


def _say_crop(pixels: Tensor, shape: tuple[int, int]) -> None:
    *_, height, width = _centre_box(pixels, shape)
    if (height, width) != tuple(pixels.shape[-2:]):
        log.warning(
            "the init image is %dx%d pixels; its centre, %dx%d, is used, as the model makes pictures of %dx%d (outpainting with "
            "margins of 0 keeps the whole picture)",
            *(pixels.shape[-1], pixels.shape[-2], width, height, shape[1], shape[0]),
        )
