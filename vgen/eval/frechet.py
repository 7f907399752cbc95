"""The Fréchet distance between two sets of vectors, each taken for a Gaussian (arXiv 1706.08500, equation 6)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.types import Grid


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½) of rows [n, D] and [m, D], in fp64. Raises VgenError for fewer than D + 1 rows."""
    for rows in (first, second):
        if rows.dim() != 2 or rows.shape[1] != first.shape[1] or len(rows) <= rows.shape[1]:
            raise VgenError(
                f"a Fréchet distance needs two sets of vectors of one width with more vectors than that, got "
                f"{list(first.shape)} and {list(second.shape)}"
            )
    (mean1, cov1), (mean2, cov2) = ((rows.double().mean(dim=0), rows.double().T.cov()) for rows in (first, second))
    root = _root(cov1)
    # S1 S2 has the eigenvalues of the symmetric S1^½ S2 S1^½, whose root is real.
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp_min(0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def token_rows(latents: Tensor) -> Tensor:
    """Latents [M, N, C] -> every token by itself: [M N, C]."""
    return rearrange(latents, "m n c -> (m n) c")


def pair_rows(latents: Tensor, grid: Grid) -> Tensor:
    """Latents [M, N, C] on a grid -> every token with its right-hand neighbour: [pairs, 2 C]."""
    maps = rearrange(latents, "m (t h w) c -> m t h w c", t=grid[0], h=grid[1])
    return torch.cat((maps[:, :, :, :-1], maps[:, :, :, 1:]), dim=-1).flatten(0, 3)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
