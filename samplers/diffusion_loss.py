"""Training losses of token diffusion with a learned variance: arXiv 2102.09672, section 3.1, as used by MAR and MaskGen-KL.

Shapes: n rows (tokens), C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vgen.samplers.diffusion import GaussianDiffusion

HALF_BIN = 1 / 255  # half the distance of two levels of an 8-bit picture in [-1, 1]; used for latents all the same
EDGE = 0.999  # values beyond it have the whole tail of the distribution


def diffusion_terms(
    process: GaussianDiffusion, output: Tensor, x0: Tensor, noise: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """(mse [n], vb [n]): the squared error of the predicted noise, and the variational bound in bits, means over channels.

    output: [n, 2C] of the network at `process.noised(x0, index, noise)`; x0, noise [n, C]; index [n] int64. Only the
    variance learns from vb: the predicted noise is detached there. The loss is their plain sum (no factor of 1/1000).
    """
    predicted, spread = output.float().chunk(2, dim=-1)
    mse = (noise - predicted).square().mean(dim=-1)
    row = index[:, None]
    x = process.noised(x0, index, noise)
    true_mean = process.posterior_mean(x0, x, row)
    mean = process.posterior_mean(process.clean(x, row, predicted.detach()), x, row)
    log_variance = process.log_variance(spread, row, x.device)
    kl = gaussian_kl(true_mean, process.on(x.device)["posterior_log_variance"][row], mean, log_variance)
    nll = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    bits = torch.where(index == 0, nll.mean(dim=-1), kl.mean(dim=-1)) / math.log(2)
    return mse, bits


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, elementwise."""
    spread = (log_variance1 - log_variance2).exp() + (mean1 - mean2).square() * (-log_variance2).exp()
    return 0.5 * (-1.0 + log_variance2 - log_variance1 + spread)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the bin of x under a Gaussian, elementwise in nats (arXiv 2006.11239, equation 13).

    Uses the tanh approximation of the normal distribution function; in fp32 it is a difference of nearly equal numbers.
    """
    inverse = (-log_scale).exp()
    above = _normal_cdf(inverse * (x - mean + HALF_BIN))
    below = _normal_cdf(inverse * (x - mean - HALF_BIN))
    probability = torch.where(x < -EDGE, above, torch.where(x > EDGE, 1 - below, above - below))
    return probability.clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
