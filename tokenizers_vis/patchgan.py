"""PatchGAN discriminator (pix2pix, arXiv 1611.07004, section 3.2.2), as VQGAN and LlamaGen train with."""

from __future__ import annotations

from torch import Tensor, nn


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
