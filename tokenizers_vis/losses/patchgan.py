"""Patch discriminators (pix2pix, arXiv 1611.07004, section 3.2.2): that of VQGAN and LlamaGen, and that of TiTok."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.errors import VgenError


class PatchDiscriminator(nn.Module):
    """4x4 convolutions: `layers` of stride 2, then two of stride 1; one logit per patch (70x70 pixels for 3 layers).

    width: channels of the first convolution, doubled per layer up to 8x. Keys `main.{i}` equal the published ones.
    In train mode BatchNorm uses the statistics of the batch at hand, so real and fake pictures go in separately.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        previous = width
        for depth in range(1, layers + 1):
            following = width * min(2**depth, 8)
            stride = 2 if depth < layers else 1
            blocks += [
                nn.Conv2d(previous, following, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(following),
                nn.LeakyReLU(0.2),
            ]
            previous = following
        blocks.append(nn.Conv2d(previous, 1, 4, padding=1))
        self.main = nn.Sequential(*blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions N(0, 0.02), BatchNorm scale N(1, 0.02) and shift 0."""
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, 1, h, w], higher = more real."""
        return self.main(pixels)


class BlurPool(nn.Module):
    """Halves both sides: a fixed blur with stride 2 (arXiv 1904.11486). Odd sides are rounded up."""

    def __init__(self, taps: Sequence[float]):
        super().__init__()
        line = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("kernel", (line[:, None] * line / line.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)]."""
        size, channels = self.kernel.shape[-1], x.shape[1]
        # "Same" padding: as much as the windows stick out, the odd pixel on the right and below.
        spare = [max((-(-side // 2) - 1) * 2 + size - side, 0) for side in (x.shape[-1], x.shape[-2])]
        x = F.pad(x, [edge for total in spare for edge in (total // 2, total - total // 2)])
        return F.conv2d(x, self.kernel.to(x).expand(channels, 1, size, size), stride=2, groups=channels)


class BlurDiscriminator(nn.Module):
    """The discriminator of TiTok's training: convolutions and blurs, GroupNorm instead of BatchNorm, always 16x16 logits.

    width: channels at first, doubled per stage from the second on; stages: halvings; blur: taps of the blur.
    Keys equal those of the released code.
    """

    def __init__(
        self, in_channels: int = 3, width: int = 128, stages: int = 3, blur: Sequence[float] = (1.0, 3.0, 3.0, 1.0)
    ):
        super().__init__()
        if width % 32:
            raise VgenError(f"the blur discriminator's width must be a multiple of its 32 norm groups, got {width}")
        self.block_in = nn.Sequential(nn.Conv2d(in_channels, width, 5, padding=2), nn.LeakyReLU(0.1))
        self.blocks = nn.ModuleList()
        previous = width
        for stage in range(stages):
            following = width * 2**stage
            self.blocks.append(
                nn.Sequential(
                    nn.Conv2d(previous, following, 3, padding=1),
                    BlurPool(blur),
                    nn.GroupNorm(32, following),
                    nn.LeakyReLU(0.1),
                )
            )
            previous = following
        self.pool = nn.AdaptiveMaxPool2d(16)
        self.to_logits = nn.Sequential(
            nn.Conv2d(previous, previous, 1), nn.LeakyReLU(0.1), nn.Conv2d(previous, 1, 5, padding=2)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, 1, 16, 16], higher = more real."""
        x = self.block_in(pixels)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(self.pool(x))
