"""Coarse-to-fine strips: one picture a row, one number of tokens a column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from vgen.layers.pixels import centre_square, to_images, to_pixels
from vgen.tokenizers_vis.flextok.flextok import FlexTok, token_counts
from vgen.viz.sheets import sheet


def token_strip(
    pixels: Tensor, made: Tensor, counts: Sequence[int], scale: int = 1, title: str | None = None
) -> Image.Image:
    """The originals [B, 3, H, W] and, beside each, the pictures [K, B, 3, H, W] from `counts` tokens. scale: enlargement."""
    columns = torch.cat((pixels[None].to(made), made))  # [1 + K, B, 3, H, W]
    images = to_images(columns.transpose(0, 1).flatten(0, 1))
    names = ["original", *(f"{count} token{'s' if count > 1 else ''}" for count in counts)]
    return sheet(images, names * len(pixels), columns=len(names), scale=scale, title=title)


def reconstruct(
    tokenizer: FlexTok,
    image: Image.Image | Sequence[Image.Image],
    num_tokens: Sequence[int] | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    scale: int = 1,
) -> Image.Image:
    """A labelled strip: what a FlexTok makes of the first 1, 2, 4, …, N tokens (or `num_tokens`) of each picture.

    Pictures are cut to the centre square of the tokenizer's size. seed: of the noise, the same for every column; steps,
    guidance: of `FlexTok.decode`; scale: integer enlargement. Raises VgenError for numbers of tokens out of range.
    """
    images = [image] if isinstance(image, Image.Image) else list(image)
    pixels = torch.stack([to_pixels(centre_square(picture, tokenizer.size[0])) for picture in images])
    counts = token_counts(tokenizer.config.registers) if num_tokens is None else list(num_tokens)
    made = tokenizer.reconstruct(pixels.to(tokenizer.device), counts, seed=seed, steps=steps, guidance=guidance)
    return token_strip(pixels, made.cpu(), counts, scale)
