"""The diagonal Gaussian over latents of KL tokenizers (arXiv 1312.6114, appendix B; clamped as in LDM, arXiv 2112.10752)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    """Mean and log-variance of a latent, both of its shape [B, C, ...]. The log-variance is clamped to [-30, 20]."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """[B, 2C, ...], the mean first: the output of an encoder."""
        mean, log_variance = moments.chunk(2, dim=1)
        return cls(mean, log_variance.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """mean + standard deviation * noise; noise: N(0, 1) of the latent's shape, None: the mode."""
        return self.mean if noise is None else self.mean + (0.5 * self.log_variance).exp() * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL divergence from N(0, 1) in nats, summed over everything but the batch: [B]."""
        terms = self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * torch.sum(terms.flatten(1), dim=1)
