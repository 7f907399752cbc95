"""In- and outpainting: which tokens of a picture are known before decoding begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from vgen.errors import VgenError
from vgen.layers.pixels import to_images, to_pixels
from vgen.samplers.types import Grid

Picture = Image.Image | Path | str


@torch.no_grad()
def known_tokens(
    tokenizer: ModelMixin, grids: Sequence[Grid], image: Picture | None, mask: Picture | None
) -> tuple[Tensor, Tensor] | None:
    """Tokens [N] or [N, C] of the image and which of them stay [N]: cells that the mask's white area does not touch. All levels.

    grids: of the levels, coarse first. None without image and mask; VgenError for one of them alone, files that cannot be read,
    different sizes, a mask without white, and tokenizers whose tokens are no places.
    """
    if image is None and mask is None:
        return None
    if image is None or mask is None:
        raise VgenError("inpainting needs both an init image and a mask (white: make anew, black: keep)")
    image, area = _open(image), _open(mask)
    if image.size != area.size:
        raise VgenError(
            f"the init image is {image.size[0]}x{image.size[1]}, its mask {area.size[0]}x{area.size[1]}; make them the same size"
        )
    if tokenizer.spec.sequence is not None:
        raise VgenError(
            "the tokens of a 1-D tokenizer are no places in the picture, so a mask says nothing about them; use a 2-D tokenizer"
        )
    tokens, stays = (torch.cat(parts) for parts in zip(*(_of_level(tokenizer, grid, image, area) for grid in grids)))
    if stays.all():
        raise VgenError("the mask has no white area, so there is nothing to make; paint what should be made anew white")
    return tokens, stays.to(tokens.device)


def _of_level(tokenizer: ModelMixin, grid: Grid, image: Image.Image, area: Image.Image) -> tuple[Tensor, Tensor]:
    """Tokens and what stays of one level: the image and its mask at that level's size."""
    _, rows, columns = grid
    down = tokenizer.spec.downsample
    size = (columns * down[2], rows * down[1])
    pixels = to_pixels(image.convert("RGB") if image.mode == "P" else image)
    if image.size != size:
        pixels = to_pixels(to_images(pixels[None])[0].resize(size, Image.Resampling.BICUBIC))
    tokens = tokenizer.encode(pixels[None].to(tokenizer.device))[0]
    white = to_pixels(area.convert("RGB").resize(size, Image.Resampling.BOX)).mean(dim=0) > -1 + 1e-3
    stays = ~white.unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).any(dim=3).any(dim=1).flatten()
    return tokens, stays


def _open(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    try:
        return Image.open(image)
    except FileNotFoundError:
        raise VgenError(f"there is no image file {image}") from None
    except OSError as error:
        raise VgenError(f"{image} is not an image that can be read ({error})") from None
