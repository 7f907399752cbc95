"""What every visual tokenizer offers: a TokenSpec, `encode` and `decode`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.types import Grid


@dataclass(frozen=True)
class TokenSpec:
    """The shape of a tokenizer's output.

    downsample: pixels per token along (time, height, width). vocabulary: number of codes of a discrete tokenizer;
    channels: floats per token of a continuous one; levels: values per channel of a channel-wise discrete one (TokenBridge, FSQ).
    """

    downsample: tuple[int, int, int]
    vocabulary: int | None = None
    channels: int | None = None
    levels: int | None = None

    def grid(self, height: int, width: int, frames: int = 1) -> Grid:
        """The token grid of a picture or clip of this size in pixels; VgenError names allowed sizes."""
        named = zip(("frames", "height", "width"), (frames, height, width), self.downsample)
        for name, size, factor in named:
            if size < 1 or size % factor:
                low = size // factor * factor
                near = f"{low} or {low + factor}" if low else f"{factor}"
                raise VgenError(f"{name} must be a multiple of {factor} for this tokenizer, got {size}; use {near}")
        return frames // self.downsample[0], height // self.downsample[1], width // self.downsample[2]

    def pixels(self, grid: Grid) -> tuple[int, int, int]:
        """(frames, height, width) of the picture or clip that a token grid stands for."""
        return grid[0] * self.downsample[0], grid[1] * self.downsample[1], grid[2] * self.downsample[2]


class Tokenizer(Protocol):
    """Pixels [B, 3, H, W] or [B, 3, T, H, W] in [-1, 1] <-> tokens [B, N] (codes) or [B, N, C], raster order."""

    spec: TokenSpec

    def encode(self, pixels: Tensor, noise: Any = None) -> Tensor:
        """Tokens of a batch; `noise` feeds tokenizers that sample their latent."""

    def decode(
        self,
        tokens: Tensor,
        grid: Grid | None = None,
        condition: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Any = None,
    ) -> Tensor:
        """Pixels of a batch. grid: None means square; the other options serve decoders that are themselves generative."""


def square_grid(tokens: int) -> Grid:
    """(1, n, n) for n*n tokens; VgenError when the count is no square."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise VgenError(f"{tokens} tokens do not fill a square; pass grid=(T, H, W)")
    return 1, side, side


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """VgenError unless every code is in [0, vocabulary). Synchronises, so call it once per batch and never in the loop."""
    low, high = (int(bound) for bound in torch.aminmax(tokens)) if tokens.numel() else (0, 0)
    if low < 0 or high >= vocabulary:
        raise VgenError(
            f"tokens must lie in 0..{vocabulary - 1} for this tokenizer, found {low}..{high}; "
            "the generator and the tokenizer do not belong together"
        )


def to_uint8(pixels: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8: clamp(127.5 x + 128, 0, 255), truncated (LlamaGen's and MAR's rounding, not round())."""
    return (127.5 * pixels.float() + 128.0).clamp(0, 255).to(torch.uint8)
