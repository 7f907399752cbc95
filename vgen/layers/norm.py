"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, statistics in fp32, cast back, then times `weight`.

    The cast comes before the weight (LlamaGen, Lumos and their relatives): in bf16 the other order gives other numbers.
    Source: arXiv 1910.07467, equation 4.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        statistics = x.float()
        normalised = statistics * torch.rsqrt(statistics.square().mean(dim=-1, keepdim=True) + self.eps)
        return normalised.to(x.dtype) * self.weight
