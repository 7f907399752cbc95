"""What every visual tokenizer offers: a TokenSpec, `encode` and `decode`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.types import Grid, grid_size


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


class CodeTokenizer:
    """`encode` and `decode` of a deterministic tokenizer of codes on a grid; clips are coded frame by frame.

    A subclass has `spec`, `quantize` (its result has `indices` [B, n]), and these three:
    features(pixels [B, 3, H, W]) -> what the quantizer gets; code_vectors(tokens [B, N]) -> [B, N, C];
    reconstruct(vectors [B, C, h, w]) -> pixels [B, 3, H, W].
    """

    def encode(self, pixels: Tensor, noise: Any = None) -> Tensor:
        """[B, 3, H, W] or [B, 3, T, H, W] in [-1, 1] -> codes [B, N] int64, raster order. noise is not used."""
        self.spec.grid(*pixels.shape[-2:])
        frames = rearrange(pixels, "b c t h w -> (b t) c h w") if pixels.dim() == 5 else pixels
        return rearrange(self.quantize(self.features(frames)).indices, "(b t) n -> b (t n)", b=pixels.shape[0])

    def codes_to_vectors(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Codes [B, T*h*w] -> code vectors [B*T, C, h, w]."""
        return rearrange(self.code_vectors(tokens), "b (t h w) c -> (b t) c h w", t=grid[0], h=grid[1], w=grid[2])

    def decode(
        self,
        tokens: Tensor,
        grid: Grid | None = None,
        condition: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Any = None,
    ) -> Tensor:
        """Codes [B, N] -> pixels [B, 3, H, W] (or [B, 3, T, H, W] for T > 1). grid: None means square.

        The decoder is deterministic and unconditional: steps and guidance raise VgenError, condition and noise are not used.
        """
        if steps is not None or guidance is not None:
            raise VgenError("a VQ decoder runs once and takes no steps or guidance; leave both out")
        grid = grid or square_grid(tokens.shape[1])
        if grid_size(grid) != tokens.shape[1]:
            raise VgenError(
                f"grid {'x'.join(map(str, grid))} has {grid_size(grid)} positions, got {tokens.shape[1]} tokens"
            )
        check_tokens(tokens, self.spec.vocabulary)
        pixels = self.reconstruct(self.codes_to_vectors(tokens, grid))
        return pixels if grid[0] == 1 else rearrange(pixels, "(b t) c h w -> b c t h w", t=grid[0])


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
