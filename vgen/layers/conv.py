"""The convolutional encoder and decoder that most image tokenizers share (VQGAN, arXiv 2012.09841, appendix; LDM; LlamaGen; MAR's and VAR's).

Data flows top to bottom: ResBlock, AttnBlock, Downsample/Upsample, Level, Encoder, Decoder. Parameter names are those of the
LlamaGen checkpoints; families that name them otherwise (`down.0.block.1`) rename keys when they convert.
Shapes: B batch, C channels, H and W of the level at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vgen.errors import VgenError


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with eps 1e-6. VgenError when `groups` does not divide `channels`."""
    if channels % groups:
        raise VgenError(
            f"{channels} channels cannot be split into {groups} norm groups; choose widths divisible by num_groups"
        )
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """norm -> swish -> conv3x3 -> norm -> swish -> dropout -> conv3x3, plus the input (1x1 conv where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 32, dropout: float = 0.0):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the H*W positions, scale C**-0.5, with a residual."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        h = self.norm(x)
        q, k, v = (rearrange(part(h), "b c h w -> b 1 (h w) c") for part in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """conv3x3 with stride 2. The zeros are added at the right and bottom only: padding=1 would shift every feature."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour x2, then conv3x3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: ResBlocks, each followed by attention where asked for, then a change of resolution (or none)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        groups: int,
        dropout: float,
        attention: bool,
        resize: str | None = None,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.res = nn.ModuleList(ResBlock(a, b, groups, dropout) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups) for _ in range(blocks if attention else 0))
        if resize == "down":
            self.downsample = Downsample(out_channels)
        elif resize == "up":
            self.upsample = Upsample(out_channels)
        self._resize = f"{resize}sample" if resize else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H', W'] with H' = H/2, 2H or H."""
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return getattr(self, self._resize)(x) if self._resize else x


def _middle(channels: int, groups: int, dropout: float, attention: bool) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResBlock(channels, channels, groups, dropout),
            AttnBlock(channels, groups) if attention else nn.Identity(),  # Identity keeps the index of the last block
            ResBlock(channels, channels, groups, dropout),
        ]
    )


class Encoder(nn.Module):
    """Pixels to features, halving the resolution between levels.

    channels: base width; multipliers: width of each level / base width, finest level first; blocks: ResBlocks per level;
    attention_levels: levels (0 = finest, -1 = coarsest) with attention after every ResBlock; groups: of every GroupNorm.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        out_channels: int,
        *,
        attention_levels: Sequence[int] = (-1,),
        middle_attention: bool = True,
        groups: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        attending = {level % len(widths) for level in attention_levels}
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        previous = channels
        for level, width in enumerate(widths):
            resize = "down" if level < len(widths) - 1 else None
            self.conv_blocks.append(Level(previous, width, blocks, groups, dropout, level in attending, resize))
            previous = width
        self.mid = _middle(previous, groups, dropout, middle_attention)
        self.norm_out = group_norm(previous, groups)
        self.conv_out = nn.Conv2d(previous, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/f, W/f] with f = 2 ** (levels - 1)."""
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features to pixels: the mirror of Encoder with one more ResBlock per level; no output activation.

    `multipliers` and `attention_levels` count from the finest level, as in Encoder; `conv_blocks` are in processing order.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        out_channels: int,
        *,
        attention_levels: Sequence[int] = (-1,),
        middle_attention: bool = True,
        groups: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        attending = {level % len(widths) for level in attention_levels}
        previous = widths[-1]
        self.conv_in = nn.Conv2d(in_channels, previous, 3, padding=1)
        self.mid = _middle(previous, groups, dropout, middle_attention)
        self.conv_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            resize = "up" if level > 0 else None
            self.conv_blocks.append(
                Level(previous, widths[level], blocks + 1, groups, dropout, level in attending, resize)
            )
            previous = widths[level]
        self.norm_out = group_norm(previous, groups)
        self.conv_out = nn.Conv2d(previous, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, out, h*f, w*f] with f = 2 ** (levels - 1)."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
