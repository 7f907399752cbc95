"""The three transformers of MingTok (arXiv 2510.06590): low-level encoder, semantic decoder, pixel decoder.

Only the encoder has positions. The semantic decoder knows the order of its tokens by causality alone, the pixel decoder not
at all. Parameter names are those of the published file (there, blocks come in chunks; there is one chunk).

Shapes: B batch, W width of the net at hand, h x w grid of N latents of C channels, n tokens of a call, r x r pixel patches
per latent, p pixels per side of a pixel patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.layers.attention import Mask
from vgen.layers.cache import KVCache, remember
from vgen.layers.transformer import Checkpointed, FusedSwiGLU, GeluMLP
from vgen.layers.vit import ViTBlock

EPS = 1e-6
HEAD_DIM = 64  # of all heads in all three nets


@dataclass
class SemanticMemory:
    """What the semantic decoder remembers of a sequence that is expanded bit by bit: `length` slots are filled."""

    cache: KVCache
    length: int = 0

    @property
    def slots(self) -> int:
        """Tokens that fit."""
        return self.cache.keys.shape[3]


@dataclass(frozen=True)
class Hidden:
    """Patches that the encoder must do without in training: masked [B, N] bool, and the token [W] that stands for their
    embeddings (their positions stay)."""

    masked: Tensor
    token: Tensor


class Trunk(Checkpointed, nn.Module):
    """A stack of blocks. hidden: width of their MLPs."""

    def __init__(self, width: int, depth: int, hidden: int, mlp: type[nn.Module]):
        super().__init__()
        if width % HEAD_DIM:
            raise VgenError(f"MingTok's widths must be multiples of its head size {HEAD_DIM}, got {width}")
        self.gradient_checkpointing = False
        blocks = nn.ModuleList(ViTBlock(width, width // HEAD_DIM, hidden, eps=EPS, mlp=mlp) for _ in range(depth))
        self.blocks = nn.ModuleList([blocks])

    def run(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None, slots: slice | None = None) -> Tensor:
        """[B, n, W] -> [B, n, W] without a final norm; with a cache the tokens enter it at `slots`."""
        for layer, block in enumerate(self.blocks[0]):
            x = self._checkpointed(block, x, mask, remember(cache, layer, slots))
        return x


class PatchEmbed(nn.Module):
    """One linear map per patch: [B, 3, H, W] -> [B, N, width]."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Raster order."""
        return rearrange(self.proj(pixels), "b c h w -> b (h w) c")


class LowLevelEncoder(Trunk):
    """Pixels to raw latents; every token sees every token. A class token stands *behind* the patches and has a latent, too."""

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, latent_channels: int):
        super().__init__(width, depth, swiglu_hidden(width), FusedSwiGLU)
        if image_size % patch_size or width % latent_channels:
            raise VgenError(
                f"image_size {image_size} must be a multiple of patch_size {patch_size}, and encoder_width {width} of "
                f"latent_channels {latent_channels} (its shortcut averages equally many channels per latent channel)"
            )
        self.side, self.patch_size, self.latent_channels = image_size // patch_size, patch_size, latent_channels
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2 + 1, width))  # the class token's row is the last
        self.patch_embed = PatchEmbed(patch_size, width)
        self.out_norm = nn.LayerNorm(width, eps=EPS)
        self.out_proj = nn.Linear(width, latent_channels)

    def positions(self, height: int, width: int) -> Tensor:
        """The position table [1, N + 1, W] of a grid: the stored one, or resized bicubically for another grid."""
        if (height, width) == (self.side, self.side):
            return self.pos_embed
        grid = rearrange(self.pos_embed[:, :-1].float(), "1 (h w) c -> 1 c h w", h=self.side)
        # The 0.1 guards against rounding in the output's size (DINOv2) but also shifts the coordinates a little: keep it.
        factors = ((height + 0.1) / self.side, (width + 0.1) / self.side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        resized = rearrange(grid.to(self.pos_embed.dtype), "1 c h w -> 1 (h w) c")
        return torch.cat((resized, self.pos_embed[:, -1:]), dim=1)

    def embed(self, pixels: Tensor, hidden: Hidden | None = None) -> Tensor:
        """[B, 3, H, W] -> what the blocks get: [B, N + 1, W]."""
        height, width = (side // self.patch_size for side in pixels.shape[-2:])
        patches = self.patch_embed(pixels)
        if hidden is not None:
            patches = torch.where(hidden.masked[..., None], hidden.token.to(patches), patches)
        tokens = torch.cat((patches, self.cls_token.to(patches).expand(len(patches), -1, -1)), dim=1)
        return tokens + self.positions(height, width).to(tokens)

    def forward(self, pixels: Tensor, hidden: Hidden | None = None) -> Tensor:
        """[B, 3, H, W] -> raw latents [B, N + 1, C], the class token's last."""
        x = self.run(self.embed(pixels, hidden))
        shortcut = reduce(x, "b n (c k) -> b n c", "mean", c=self.latent_channels)  # of x without a norm
        return shortcut + self.out_proj(F.gelu(self.out_norm(x)))


class SemanticDecoder(Trunk):
    """Raw latents to semantic features, strictly causally: a token's feature never changes when more tokens follow."""

    def __init__(self, latent_channels: int, width: int, depth: int):
        super().__init__(width, depth, swiglu_hidden(width), FusedSwiGLU)
        if width % latent_channels:
            raise VgenError(
                f"semantic_width {width} must be a multiple of latent_channels {latent_channels} (its shortcut repeats them)"
            )
        self.repeats = width // latent_channels
        self.in_proj = nn.Linear(latent_channels, width)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def embed(self, latents: Tensor) -> Tensor:
        """[B, n, C] -> [B, n, W]: linear, plus every channel repeated."""
        return self.in_proj(latents) + repeat(latents, "b n c -> b n (c k)", k=self.repeats)

    def start(self, batch: int, slots: int) -> SemanticMemory:
        """An empty memory for sequences of at most `slots` tokens."""
        blocks, weight = self.blocks[0], self.in_proj.weight
        cache = KVCache(len(blocks), batch, blocks[0].attn.heads, slots, HEAD_DIM, weight.device, weight.dtype)
        return SemanticMemory(cache)

    def forward(self, latents: Tensor, memory: SemanticMemory | None = None) -> Tensor:
        """Raw latents [B, n, C] -> normalised features [B, n, W] of all n tokens.

        memory: what came before (None: nothing); the tokens enter it. Any n gives the same features as one call for all.
        """
        count, start = latents.shape[1], 0 if memory is None else memory.length
        mask = None  # a single new token sees everything
        if count > 1:
            mask = torch.ones(count, start + count, dtype=torch.bool, device=latents.device).tril(start)
        x = self.embed(latents)
        if memory is None:
            return self.norm(self.run(x, mask))
        if start + count > memory.slots:
            raise VgenError(
                f"the semantic memory has {memory.slots} slots, {start + count} are needed; start a larger one"
            )
        x = self.run(x, mask, memory.cache, slice(start, start + count))
        memory.length += count
        return self.norm(x)


class PixelDecoder(Trunk):
    """Pixel-patch tokens to patches of pixels; every token sees every token."""

    def __init__(self, patch_size: int, width: int, depth: int):
        # Not the SwiGLU of the other two, although the released config says so for all three.
        super().__init__(width, depth, 4 * width, GeluMLP)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Linear(width, 3 * patch_size**2)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N r r, W] -> [B, N r r, p p 3]: rows, columns, colours."""
        return self.head(self.norm(self.run(tokens)))


def swiglu_hidden(width: int, ratio: int = 4) -> int:
    """Hidden width of MingTok's SwiGLU: 2/3 of `ratio` times the width (rounded down), rounded up to a multiple of 8."""
    return -(-(2 * ratio * width // 3) // 8) * 8


def subdivide(tokens: Tensor, height: int, ratio: int) -> Tensor:
    """[B, h w, r r W] -> [B, (h r) (w r), W]: one token per sub-patch, raster order over the finer grid."""
    return rearrange(tokens, "b (h w) (a e c) -> b (h a w e) c", h=height, a=ratio, e=ratio)


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] -> [B, patches, p p 3]; in a patch colours vary fastest."""
    return rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, height: int, patch_size: int) -> Tensor:
    """The inverse of `patchify` for a picture that is `height` patches high."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=patch_size, q=patch_size)
