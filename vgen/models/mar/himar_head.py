"""Hi-MAR's second head: diffusion of the whole dense grid (arXiv 2505.20288, section 3.3).

Shapes: n pictures, L tokens of C channels, D width of the backbone's features, R guidance rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vgen.layers.grid_head import GridHead
from vgen.samplers.diffusion import GaussianDiffusion
from vgen.samplers.predictions import GridDiffusion
from vgen.samplers.types import Grid


class GridDenoiser(nn.Module):
    """Predicts the noise in all tokens at once; known tokens take part, noisy as the others, and what is made of them is dropped.

    grid: (1, H, W); the other arguments are those of `GridHead`.
    """

    def __init__(
        self, grid: Grid, channels: int, features: int, width: int, layers: int, heads: int, mlp_ratio: float = 4.0
    ):
        super().__init__()
        self.net = GridHead(grid[1:], channels, features, width, layers, heads, mlp_ratio)
        self.process = GaussianDiffusion.named("cosine")

    def reset_parameters(self) -> None:
        """The release's initialisation."""
        self.net.reset_parameters()

    def error(self, features: Tensor, targets: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Squared error [n, L, C] of the predicted noise. features [n, L, D], targets and noise [n, L, C], times [n] int64."""
        predicted = self.net(self.process.noised(targets, times, noise), times, features)
        return (noise - predicted.float()).square()

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        masked: Tensor,
        times: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The squared error at masked [n, L] places, as a mean over *all* places: pictures with more unknown count more (as released).

        Arguments as in `error`; times and noise are drawn where they are None. mse: the mean over masked places, for logs.
        """
        if times is None:
            times = torch.randint(len(self.process), (len(targets),), device=targets.device)
        noise = torch.randn_like(targets) if noise is None else noise
        error = self.error(features, targets, times, noise) * masked[..., None]
        share = masked.float().mean().clamp_min(1e-6)
        return {"loss": error.mean(), "mse": error.detach().mean() / share}

    def prediction(self, features: Tensor, tokens: Tensor, masked: Tensor, first: int) -> GridDiffusion:
        """features [R, B, L, D], one part per guidance row; the other arguments are those of `GridDiffusion`."""
        return GridDiffusion(features, tokens, masked, self.net, self.process, first)
