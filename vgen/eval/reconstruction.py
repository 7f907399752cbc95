"""What a tokenizer keeps of a picture: reconstructions, their figures, and what they cost in bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.metrics import WINDOW, psnr, ssim
from vgen.samplers.types import grid_size
from vgen.tokenizers_vis.base import TokenSpec, decode_each, encode_each, to_uint8

PIXEL_BITS = 24  # an RGB pixel of 8 bits a channel
FLOAT_BITS = 16  # a float of a continuous token, stored in half precision


@dataclass(frozen=True)
class Cost:
    """Of one picture: tokens, and bits if every token is stored by itself (floats in half precision)."""

    tokens: int
    bits: float
    pixels: int

    @property
    def bits_per_pixel(self) -> float:
        """Bits for a pixel of the picture."""
        return self.bits / self.pixels

    @property
    def compression(self) -> float:
        """How many times smaller than raw 24-bit pixels."""
        return PIXEL_BITS / self.bits_per_pixel


def cost(spec: TokenSpec, height: int, width: int, num_tokens: int | None = None) -> Cost:
    """The cost of a picture of this size; num_tokens: kept of a sequence (None: all)."""
    tokens = num_tokens or grid_size(spec.grid(height, width))
    if spec.vocabulary is not None:
        bits = math.log2(spec.vocabulary)
    elif spec.levels is not None:
        bits = spec.channels * math.log2(spec.levels)
    else:
        bits = spec.channels * FLOAT_BITS
    return Cost(tokens, tokens * bits, height * width)


def picture_size(spec: TokenSpec, wanted: tuple[int, int] | None, default: int) -> tuple[int, int]:
    """(H, W) in pixels that pictures are brought to: `wanted`, or what a 1-D tokenizer was made for, or a square of `default`.

    Raises VgenError when the tokenizer cannot take `wanted` (saying which sides it can), or when it is too small to be measured.
    """
    if wanted is None:
        wanted = (default, default) if spec.sequence is None else spec.downsample[1:]
    spec.grid(*wanted)
    if min(wanted) < WINDOW:
        raise VgenError(
            f"SSIM compares windows of {WINDOW} x {WINDOW} pixels, so pictures need as many on a side, got {wanted[0]} x {wanted[1]}"
        )
    return wanted


@dataclass(frozen=True)
class Reconstruction:
    """M pictures and what came back, both [M, 3, H, W] in [-1, 1], with a figure [M] per name: psnr (dB), ssim, and lpips if asked for."""

    pixels: Tensor
    reconstruction: Tensor
    figures: dict[str, Tensor]

    def means(self) -> dict[str, float]:
        """The mean of every figure."""
        return {name: values.mean().item() for name, values in self.figures.items()}


@torch.no_grad()
def reconstruct_batches(
    tokenizer: ModelMixin,
    pixels: Tensor,
    num_tokens: int | None = None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    lpips: nn.Module | None = None,
    batch_size: int = 16,
    first: int = 0,
) -> Iterator[Reconstruction]:
    """Codes and decodes pictures [M, 3, H, W] in [-1, 1], a batch at a time.

    num_tokens: keep so many of the tokens (tokenizers of flexible length only); steps, guidance: of generative decoders, which
    start from noise that belongs to the picture; first: the number of the first one. A picture comes back the same whatever the batch
    size (`decode_each`). Raises VgenError for options that the tokenizer does not have.
    """
    grid = tokenizer.spec.grid(*pixels.shape[-2:])
    full = grid_size(grid)
    if num_tokens is not None and not 1 <= num_tokens <= full:
        raise VgenError(
            f"this tokenizer makes {full} tokens a picture, {num_tokens} of them cannot be kept; choose 1 to {full}"
        )
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, **tokenizer.spec.size_options(*pixels.shape[-2:])}
    for start in range(0, len(pixels), batch_size):
        part = pixels[start : start + batch_size].to(tokenizer.device, tokenizer.dtype)
        tokens = encode_each(tokenizer, part)
        kept, shape = (tokens, grid) if num_tokens in (None, full) else (tokens[:, :num_tokens], None)
        samples = torch.arange(first + start, first + start + len(part))
        made = decode_each(tokenizer, kept, shape, samples=samples, **options)
        part, made = part.float().cpu(), made.float().cpu().clamp(-1, 1)
        real, copy = to_uint8(part), to_uint8(made)
        figures = {"psnr": psnr(real, copy), "ssim": ssim(real, copy)}
        if lpips is not None:
            figures["lpips"] = lpips(part, made).flatten()
        yield Reconstruction(part, made, figures)


def joined(parts: list[Reconstruction]) -> Reconstruction:
    """Batches as one."""
    figures = {name: torch.cat([part.figures[name] for part in parts]) for name in parts[0].figures}
    return Reconstruction(
        torch.cat([part.pixels for part in parts]), torch.cat([part.reconstruction for part in parts]), figures
    )


@dataclass(frozen=True)
class Measured:
    """One number of tokens over many pictures: a figure [M] per name, and the first reconstructions [s, 3, H, W]."""

    num_tokens: int | None
    figures: dict[str, Tensor]
    shown: Tensor

    def means(self) -> dict[str, float]:
        """The mean of every figure."""
        return {name: values.mean().item() for name, values in self.figures.items()}


def measure(
    tokenizer: ModelMixin,
    pictures: Iterable[Tensor],
    num_tokens: Sequence[int | None] = (None,),
    *,
    shown: int = 0,
    batch_size: int = 16,
    **options: Any,
) -> tuple[Tensor, list[Measured]]:
    """Measures pictures [3, H, W] as they come: no more than a batch and the first `shown` are in memory, however many there are.

    Returns the first pictures [s, 3, H, W] and a result for each of `num_tokens`. options: of `reconstruct_batches`. Raises VgenError
    as that does, and where there is no picture.
    """
    originals, made, figures = [], [[] for _ in num_tokens], [[] for _ in num_tokens]
    seen, pictures = 0, iter(pictures)
    while batch := list(islice(pictures, batch_size)):
        pixels, keep = torch.stack(batch), max(0, shown - seen)
        for row, kept in enumerate(num_tokens):
            (result,) = reconstruct_batches(tokenizer, pixels, kept, batch_size=len(batch), first=seen, **options)
            figures[row].append(result.figures)
            made[row] += result.reconstruction[:keep].clone()
        originals += pixels[:keep].clone()  # pictures, not a view of the batch: that would keep all of it
        seen += len(batch)
    if not seen:
        raise VgenError("there are no pictures to measure: none can be read")
    rows = [
        Measured(kept, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, _stacked(images, pixels))
        for kept, parts, images in zip(num_tokens, figures, made)
    ]
    return _stacked(originals, pixels), rows


def _stacked(pictures: Sequence[Tensor], like: Tensor) -> Tensor:
    """[s, 3, H, W], of none too."""
    return torch.stack(list(pictures)) if pictures else like[:0].clone()
