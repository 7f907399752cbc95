"""How close two pictures are: PSNR and SSIM, on 8-bit values as a file would hold them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11  # pixels on a side of what SSIM compares


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per picture, [B]. x, y: [B, 3, H, W] uint8. Equal pictures give 100 dB."""
    error = (x.double() - y.double()).square().mean(dim=(1, 2, 3)) / 255**2
    return -10 * error.clamp_min(1e-10).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity per picture, [B] (Wang et al. 2004, eq. 13: 11x11 Gaussian window, sigma 1.5), mean over RGB.

    x, y: [B, 3, H, W] uint8, at least WINDOW px a side; only windows that lie wholly inside count.
    """
    x, y = x.float(), y.float()
    offsets = torch.arange(WINDOW, device=x.device) - WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    line = line / line.sum()
    window = (line[:, None] * line[None, :]).expand(3, 1, WINDOW, WINDOW)
    with torch.autocast(x.device.type, enabled=False):  # variances are small differences: bf16 would eat them
        mean_x, mean_y, square_x, square_y, product = (
            F.conv2d(value, window, groups=3) for value in (x, y, x * x, y * y, x * y)
        )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variance_x, variance_y = square_x - mean_x.square(), square_y - mean_y.square()
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    contrast = (2 * (product - mean_x * mean_y) + c2) / (variance_x + variance_y + c2)
    return (luminance * contrast).mean(dim=(1, 2, 3))
