"""The MaskGIT-VQGAN tokenizer: f16, 1024 codes of 256 numbers (arXiv 2202.04200; PyTorch weights published with TiTok).

RAR generates its tokens, and the first TiTok models decode through it. It is fully convolutional, without attention, and
works on any sides that are multiples of 16. Its own value range is [0, 1]; `encode` and `decode` speak vgen's [-1, 1].
Parameter names are those of the released file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    ConfigMixin,
    ModelMixin,
)  # ModelMixin must be a name of this module: saved pipelines look for it here
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.exports import Exported
from vgen.layers.conv import group_norm
from vgen.sizes import NamedSizes
from vgen.tokenizers_vis.base import CodeTokenizer, TokenSpec
from vgen.tokenizers_vis.latents.quantizers import Quantized, VectorQuantizer, with_bookkeeping

# Keyword arguments of MaskGITVQGAN. f16-1024: the released file. emoji-f8: ours, for 64-px pictures on CPUs.
SIZES: dict[str, dict[str, Any]] = {
    "f16-1024": {},  # 54.5 M
    "emoji-f8": {
        "hidden_channels": 32,
        "channel_mult": (1, 2, 2, 4),
        "num_res_blocks": 1,
        "z_channels": 64,
        "num_groups": 16,
    },
}


class Block(nn.Module):
    """norm -> swish -> conv3x3 -> norm -> swish -> conv3x3, without biases; plus the input where the width stays.

    Where the width changes the shortcut convolution reads *the block's own output* and the input is dropped from the sum:
    looks like a mistake, but the published weights were trained with it.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = (
            nn.Conv2d(out_channels, out_channels, 1, bias=False) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class Level(nn.Module):
    """Blocks of one resolution; `upsample_conv` where the decoder doubles it afterwards."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, upsample: bool = False):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(Block(a, b, groups) for a, b in pairwise(widths))
        self.upsample_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W], or twice the sides."""
        for block in self.block:
            x = block(x)
        return x if self.upsample_conv is None else self.upsample_conv(F.interpolate(x, scale_factor=2.0))


class Encoder(nn.Module):
    """Pixels in [0, 1] to features; 2x2 average pooling between levels."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        out_channels: int,
        groups: int = 32,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(a, b, blocks, groups) for a, b in pairwise([channels, *widths]))
        self.mid = nn.ModuleList(Block(widths[-1], widths[-1], groups) for _ in range(blocks))
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/f, W/f] with f = 2 ** (levels - 1)."""
        x = self.conv_in(x)
        for index, level in enumerate(self.down):
            x = level(F.avg_pool2d(x, 2) if index else x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Code vectors to pixels around [0, 1], not clamped. `up` is indexed by level, finest first, and runs from last to first."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        out_channels: int,
        groups: int = 32,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(Block(widths[-1], widths[-1], groups) for _ in range(blocks))
        above = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level(above[level], width, blocks, groups, upsample=level > 0) for level, width in enumerate(widths)
        )
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] -> [B, out, h*f, w*f] with f = 2 ** (levels - 1)."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(VectorQuantizer):
    """Nearest code in squared L2 distance, without normalisation. `beta` weighs the term that moves the *codes*: it sits on
    the other term than in VQ-VAE (arXiv 1711.00937, equation 3), as in the published code."""

    def __init__(self, codes: int, channels: int, beta: float = 0.25, window: int = 0):
        super().__init__(codes, channels, normalise=False, beta=1.0, window=window, vq_weight=beta)

    def soft_codes(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        """[B, C, h, w] -> softmax(-squared distance / temperature): [B, h*w, codes]."""
        rows, codes = rearrange(z.float(), "b c h w -> b (h w) c"), self.embedding.weight.float()
        distance = rows.square().sum(dim=-1, keepdim=True) + codes.square().sum(dim=-1) - 2 * rows @ codes.T
        return (-distance / temperature).softmax(dim=-1)


@dataclass(frozen=True)
class VQGANOutput:
    """A training forward: reconstruction [B, 3, H, W] in [-1, 1], not clamped, and what the quantizer said."""

    reconstruction: Tensor
    quantized: Quantized


class MaskGITVQGAN(NamedSizes, CodeTokenizer, Exported, ModelMixin, ConfigMixin):
    """Encoder, codebook, decoder. Keys and values equal the published file.

    hidden_channels: base width; channel_mult: width multipliers, finest level first; num_res_blocks: per level;
    z_channels: width of a code; num_embeddings: codes; beta: `Codebook`; num_groups: of every GroupNorm; usage_window: length
    of the usage queue (0: none, as in the published file).
    """

    SIZES = SIZES
    coding_parts = ("encoder", "quantize")  # what decides about the tokens of a picture

    @register_to_config
    def __init__(
        self,
        hidden_channels: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        num_embeddings: int = 1024,
        beta: float = 0.25,
        num_groups: int = 32,
        usage_window: int = 0,
    ):
        super().__init__()
        self.encoder = Encoder(3, hidden_channels, channel_mult, num_res_blocks, z_channels, num_groups)
        self.decoder = Decoder(z_channels, hidden_channels, channel_mult, num_res_blocks, 3, num_groups)
        self.quantize = Codebook(num_embeddings, z_channels, beta, usage_window)
        factor = 2 ** (len(channel_mult) - 1)
        self.spec = TokenSpec(downsample=(1, factor, factor), vocabulary=num_embeddings)

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "f16-1024"
    ) -> MaskGITVQGAN:
        """A model from the published file (flat state dict) or its state dict. config: a size of SIZES or keyword arguments.

        Raises VgenError when the file is no such checkpoint or its shapes do not fit the config.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        with torch.device("meta"):
            model = cls.of_size(config) if isinstance(config, str) else cls(**config)
        load_exactly(model, with_bookkeeping(model, state))
        return model.eval()

    from_single_file = from_original

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> what the quantizer gets: [B, C, h, w]."""
        return self.encoder((pixels + 1) / 2)

    def forward(self, pixels: Tensor) -> VQGANOutput:
        """[B, 3, H, W] in [-1, 1] -> reconstruction and quantizer losses (the losses in train mode only)."""
        quantized = self.quantize(self.features(pixels))
        return VQGANOutput(self.decoder(quantized.quantized) * 2 - 1, quantized)

    def code_vectors(self, tokens: Tensor) -> Tensor:
        """Codes [...] -> code vectors [..., C]."""
        return self.quantize.embedding(tokens)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """[B, C, h, w] code vectors -> [B, 3, H, W], clamped to [-1, 1]."""
        return self.decoder(vectors).clamp(0, 1) * 2 - 1

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive GAN weight looks at: the decoder's last convolution."""
        return self.decoder.conv_out.weight
