"""What every visual tokenizer offers: a TokenSpec, `encode` and `decode`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.noise import PhiloxNoise
from vgen.samplers.types import Grid, grid_size
from vgen.tokenizers_vis.latents.posterior import DiagonalGaussian
from vgen.values import shown

SMALL = 128 * 128  # pixels of a picture
TOGETHER = 4  # small pictures that a CPU codes together


@dataclass(frozen=True)
class TokenSpec:
    """The shape of a tokenizer's output.

    downsample: pixels per token along (time, height, width). vocabulary: number of codes of a discrete tokenizer;
    channels: floats per token of a continuous one; levels: values per channel of a channel-wise discrete one (TokenBridge, FSQ).
    sequence: tokens of a 1-D tokenizer (TiTok), which takes pictures of exactly `downsample` pixels; its grid is (1, 1, sequence).
    multiple: of a 1-D tokenizer that takes other sizes as well (FlexTok): sides are multiples of it, `downsample` is the largest.
    """

    downsample: tuple[int, int, int]
    vocabulary: int | None = None
    channels: int | None = None
    levels: int | None = None
    sequence: int | None = None
    multiple: int | None = None

    def grid(self, height: int, width: int, frames: int = 1) -> Grid:
        """The token grid of a picture or clip of this size in pixels; VgenError names allowed sizes."""
        if self.sequence is not None:
            self._check_sequence(frames, height, width)
            return 1, 1, self.sequence
        named = zip(("frames", "height", "width"), (frames, height, width), self.downsample)
        for name, size, factor in named:
            if size < 1 or size % factor:
                low = size // factor * factor
                near = f"{low} or {low + factor}" if low else f"{factor}"
                raise VgenError(f"{name} must be a multiple of {factor} for this tokenizer, got {size}; use {near}")
        return frames // self.downsample[0], height // self.downsample[1], width // self.downsample[2]

    def _check_sequence(self, frames: int, height: int, width: int) -> None:
        limits, found = self.downsample, f"{frames}x{height}x{width}"
        if self.multiple is None:
            if (frames, height, width) != limits:
                wanted = "x".join(map(str, limits))
                raise VgenError(
                    f"this tokenizer takes {wanted} (frames x height x width) and nothing else, got {found}; resize and crop"
                )
            return
        sides = zip((height, width), limits[1:])
        if frames != 1 or not all(0 < side <= limit and side % self.multiple == 0 for side, limit in sides):
            raise VgenError(
                f"this tokenizer takes pictures of up to {limits[1]}x{limits[2]} (height x width) whose sides are multiples of "
                f"{self.multiple}, got {found.removeprefix('1x')}; it was made for {limits[1]}x{limits[2]}, so resize and crop to that"
            )

    def size_options(self, height: int, width: int) -> dict[str, tuple[int, int]]:
        """What `decode` must be told about the picture besides its grid: nothing where the grid says it, else `size`."""
        return {} if self.multiple is None else {"size": (height, width)}

    def pixels(self, grid: Grid) -> tuple[int, int, int]:
        """(frames, height, width) of the picture or clip that a token grid stands for (sequences: the largest)."""
        if self.sequence is not None:
            return self.downsample
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
        check_pixels(pixels)
        self.spec.grid(*pixels.shape[-2:])
        frames = rearrange(pixels, "b c t h w -> (b t) c h w") if pixels.dim() == 5 else pixels
        frames = frames.to(self.dtype)
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
        refuse_steps(steps, guidance)
        check_tokens(tokens, self.spec.vocabulary)
        grid = fitting_grid(tokens, grid)
        pixels = self.reconstruct(self.codes_to_vectors(tokens, grid))
        return pixels if grid[0] == 1 else rearrange(pixels, "(b t) c h w -> b c t h w", t=grid[0])


class LatentTokenizer:
    """`encode` and `decode` of a tokenizer of Gaussian latents on a grid (a VAE); clips are coded frame by frame.

    A subclass has `spec`, `config.scale` (latents times it have a standard deviation of about 1) and these two, on unscaled
    latent maps: posterior(pixels [B, 3, H, W]) -> DiagonalGaussian over [B, C, h, w]; reconstruct(latents [B, C, h, w]) ->
    pixels [B, 3, H, W]. packing: latents per side that make one token (1: every latent is a token).
    """

    packing: int = 1

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] or [B, 3, T, H, W] in [-1, 1] -> scaled latents [B, N, C], raster order.

        noise: N(0, 1) of the result's shape, for a sample of the posterior. None: its mode.
        """
        posterior, grid = self._posterior(pixels)
        if noise is not None:
            shape = (pixels.shape[0], grid_size(grid), self.spec.channels)
            if noise.shape != shape:
                raise VgenError(f"noise must have the shape of the latents, {list(shape)}, got {list(noise.shape)}")
            noise = to_maps(noise, grid, self.packing)
        return self._tokens(posterior.sample(noise), grid)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents of a batch, [B, N, C] each: what is cached for training."""
        posterior, grid = self._posterior(pixels)
        return self._tokens(posterior.mean, grid), self._tokens((0.5 * posterior.log_variance).exp(), grid)

    def _posterior(self, pixels: Tensor) -> tuple[DiagonalGaussian, Grid]:
        check_pixels(pixels)
        grid = self.spec.grid(*pixels.shape[-2:], pixels.shape[2] if pixels.dim() == 5 else 1)
        frames = rearrange(pixels, "b c t h w -> (b t) c h w") if pixels.dim() == 5 else pixels
        return self.posterior(frames.to(self.dtype)), grid

    def _tokens(self, maps: Tensor, grid: Grid) -> Tensor:
        """Unscaled latent maps -> scaled tokens."""
        return from_maps(maps * self.config.scale, grid[0], self.packing)

    def decode(
        self,
        tokens: Tensor,
        grid: Grid | None = None,
        condition: Any = None,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Any = None,
    ) -> Tensor:
        """Scaled latents [B, N, C] -> pixels [B, 3, H, W] (or [B, 3, T, H, W] for T > 1), not clamped. grid: None means square.

        The decoder is deterministic and unconditional: steps and guidance raise VgenError, condition and noise are not used.
        """
        refuse_steps(steps, guidance)
        check_latents(tokens, self.spec.channels)
        grid = fitting_grid(tokens, grid)
        pixels = self.reconstruct(to_maps(tokens, grid, self.packing) / self.config.scale)
        return pixels if grid[0] == 1 else rearrange(pixels, "(b t) c h w -> b c t h w", t=grid[0])

    @torch.no_grad()
    def calibrate(self, pixels: Tensor) -> float:
        """Sets `scale` to 1 / (standard deviation of the latents of these pictures) and returns it (LDM, appendix G).

        Call it once after training, on a few hundred pictures [B, 3, H, W]: generators learn latents in this scale.
        """
        posterior = self.posterior(pixels)
        variance = posterior.mean.var() + posterior.log_variance.exp().mean()
        scale = variance.rsqrt().item()
        self.register_to_config(scale=scale)
        return scale


@torch.no_grad()
def encode_each(tokenizer: Any, pixels: Tensor) -> Tensor:
    """Tokens of pictures [B, 3, H, W], on a CPU the same bits for a picture whatever B is (see `coded_together`)."""
    count, size = len(pixels), pixels.shape[-2:]
    return torch.cat([tokenizer.encode(pixels[rows]) for rows in coded_together(tokenizer, count, size)])[:count]


@torch.no_grad()
def decode_each(
    tokenizer: Any,
    tokens: Tensor,
    grid: Grid | None = None,
    *,
    samples: Tensor,
    seed: int = 0,
    condition: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Pixels [B, 3, H, W] of tokens [B, N, …]; on a CPU the same bits for a picture whatever B is and beside whom it lies.

    samples: [B] numbers of the pictures; those of generative decoders start from the noise of (seed, sample). condition: a row
    a picture. options: of `decode`.
    """
    spec, count, made = tokenizer.spec, len(tokens), []
    size = spec.pixels(square_grid(tokens.shape[1]) if grid is None and spec.sequence is None else grid)[1:]
    for rows in coded_together(tokenizer, count, size):
        text = None if condition is None else condition[rows]
        made.append(tokenizer.decode(tokens[rows], grid, text, noise=PhiloxNoise(seed, samples[rows]), **options))
    return torch.cat(made)[:count]


def coded_together(tokenizer: Any, count: int, size: Sequence[int]) -> list[Tensor]:
    """Which of `count` pictures of this size (height, width) go through a tokenizer in one call: numbers [k] int64 each.

    Convolutions and matrix products round by the number of rows, which moves a few pixels by one level. So on a CPU k is always
    the same: TOGETHER for small pictures (one alone takes PyTorch's slower convolution), 1 for larger ones and for decoders of
    many steps. Where pictures are missing the last one stands in: what is made of it lies behind the first `count` rows.
    Accelerators take all at once: their transformers round by the batch already.
    """
    if tokenizer.device.type != "cpu":
        return [torch.arange(count)]
    together = TOGETHER if size[0] * size[1] <= SMALL and "steps" not in tokenizer.config else 1
    return list(torch.arange(count + -count % together).clamp(max=count - 1).split(together))


def to_maps(tokens: Tensor, grid: Grid, packing: int = 1) -> Tensor:
    """Tokens [B, T*h*w, C*p*p] on a grid (T, h, w) -> latent maps [B*T, C, h*p, w*p]; p = packing.

    Inside a token the channel is the outermost index, then the row, then the column (MAR's patches).
    """
    time, height, width = grid
    pattern = "b (t h w) (c p q) -> (b t) c (h p) (w q)"
    return rearrange(tokens, pattern, t=time, h=height, w=width, p=packing, q=packing)


def from_maps(maps: Tensor, frames: int = 1, packing: int = 1) -> Tensor:
    """Latent maps [B*T, C, h*p, w*p] -> tokens [B, T*h*w, C*p*p]: the inverse of `to_maps`."""
    return rearrange(maps, "(b t) c (h p) (w q) -> b (t h w) (c p q)", t=frames, p=packing, q=packing)


def square_grid(tokens: int) -> Grid:
    """(1, n, n) for n*n tokens; VgenError when the count is no square."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise VgenError(f"{tokens} tokens do not fill a square; pass grid=(T, H, W)")
    return 1, side, side


def fitting_grid(tokens: Tensor, grid: Grid | None) -> Grid:
    """`grid`, or for None the square one; VgenError unless it has as many positions as tokens [B, N] or [B, N, C]."""
    count = tokens.shape[1]
    grid = grid or square_grid(count)
    if grid_size(grid) != count:
        raise VgenError(f"grid {'x'.join(map(str, grid))} has {grid_size(grid)} positions, got {count} tokens")
    return grid


def refuse_steps(steps: int | None, guidance: float | None) -> None:
    """VgenError for the options of generative decoders, in one that runs once."""
    if steps is not None or guidance is not None:
        raise VgenError("this decoder runs once and takes no steps or guidance; leave both out")


def check_pixels(pixels: Tensor, limit: float = 8.0) -> None:
    """VgenError unless pixels are finite floats [B, 3, H, W] or [B, 3, T, H, W] of the kind [-1, 1], on any device in any precision.

    limit: values beyond it are no overshoot but levels from 0 to 255. Synchronises: once per batch.
    """
    wanted = "a tokenizer takes float pixels [B, 3, H, W] or [B, 3, T, H, W] in [-1, 1]"
    if not isinstance(pixels, Tensor):
        raise VgenError(f"{wanted}, got {shown(pixels)}; vgen.layers.pixels.to_pixels makes them of a PIL image")
    if not pixels.is_floating_point():
        raise VgenError(f"{wanted}, got {pixels.dtype}; levels from 0 to 255 become pixels by x / 127.5 - 1")
    if pixels.dim() not in (4, 5) or pixels.shape[1] != 3 or not pixels.numel():
        raise VgenError(f"{wanted}, got the shape {list(pixels.shape)}")
    low, high = (float(bound) for bound in torch.aminmax(pixels))
    if not (-limit <= low and high <= limit):
        raise VgenError(f"{wanted}, found {low:g} to {high:g}; levels from 0 to 255 become pixels by x / 127.5 - 1")


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """VgenError unless tokens are whole numbers [B, N] or [B, N, C], every one in [0, vocabulary).

    Synchronises, so call it once per batch and never in the loop.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() not in (2, 3) or tokens.dtype not in (torch.int64, torch.int32):
        found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else shown(tokens)
        raise VgenError(f"codes are an int64 tensor [B, N] (TokenBridge: [B, N, C]), got {found}")
    low, high = (int(bound) for bound in torch.aminmax(tokens)) if tokens.numel() else (0, 0)
    if low < 0 or high >= vocabulary:
        raise VgenError(
            f"tokens must lie in 0..{vocabulary - 1} for this tokenizer, found {low}..{high}; "
            "the generator and the tokenizer do not belong together"
        )


def check_latents(tokens: Tensor, channels: int, limit: float = 3.0) -> None:
    """VgenError unless tokens are floats [B, N, channels], finite, with a standard deviation of at most `limit`.

    Latents are scaled to a standard deviation of about 1; without the scale, MAR's have 4.3. Synchronises: once per batch.
    """
    if not isinstance(tokens, Tensor):
        raise VgenError(f"latents of this tokenizer are floats [B, N, {channels}], got {shown(tokens)}")
    if tokens.dim() != 3 or tokens.shape[2] != channels or not tokens.is_floating_point():
        raise VgenError(
            f"latents of this tokenizer are floats [B, N, {channels}], got {tokens.dtype} {list(tokens.shape)}; "
            "the generator and the tokenizer do not belong together"
        )
    deviation = tokens.float().std(correction=0).item()
    if not math.isfinite(deviation):
        raise VgenError("latents must be finite, found NaN or infinity; look for the step that produced it")
    if deviation > limit:
        raise VgenError(
            f"latents must be scaled to a standard deviation of about 1, found {deviation:.3g}; "
            "multiply raw latents by the tokenizer's scale; where a model made them, it needs more substeps, a lower temperature "
            "or more training"
        )


def to_uint8(pixels: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8: clamp(127.5 x + 128, 0, 255), truncated (LlamaGen's and MAR's rounding, not round())."""
    return (127.5 * pixels.float() + 128.0).clamp(0, 255).to(torch.uint8)
