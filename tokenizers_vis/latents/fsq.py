"""Finite scalar quantization (arXiv 2309.15505): every channel is bounded and rounded to a few levels; no codebook is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import VgenError

BOUND_MARGIN = 1e-3  # the bound lies this share outside the outermost levels, so that they can be reached


@dataclass(frozen=True)
class FiniteScalarQuantizer:
    """Codes with `levels[d]` values in channel d, the last dimension of every tensor here. It has no parameters.

    A code's value in a channel with L levels is q / (L // 2) for integers q from -(L // 2): odd L span [-1, 1], even L
    [-1, 1 - 2/L]. Its index is little-endian: channel 0 has stride 1. Arithmetic is fp32 whatever the input is.
    """

    levels: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "levels", tuple(int(level) for level in self.levels))
        if not self.levels or min(self.levels) < 2:
            raise VgenError(
                f"FSQ needs at least 2 levels in every channel, got {list(self.levels)}; for example 8, 8, 8, 5, 5, 5"
            )

    @property
    def channels(self) -> int:
        """Numbers per code."""
        return len(self.levels)

    @property
    def vocabulary(self) -> int:
        """How many codes there are: the product of the levels."""
        return math.prod(self.levels)

    @property
    def basis(self) -> tuple[int, ...]:
        """Stride of every channel in the index."""
        return tuple(math.prod(self.levels[:d]) for d in range(self.channels))

    def bound(self, z: Tensor) -> Tensor:
        """[..., C] -> [..., C] fp32, within the range of the levels, before rounding (equation 1, shifted for even L)."""
        half = [(level - 1) * (1 + BOUND_MARGIN) / 2 for level in self.levels]
        offset = [0.5 if level % 2 == 0 else 0.0 for level in self.levels]
        shift = [math.atanh(o / h) for o, h in zip(offset, half)]
        half, offset, shift = (_row(values, z) for values in (half, offset, shift))
        return torch.tanh(z.float() + shift) * half - offset

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """[..., C] -> codes [..., C] fp32 with the gradient of `bound` (straight through), indices [...] int64."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()  # round() takes halves to the even level
        codes = rounded / _row(self._middle, z)
        return codes, self.indices(codes)

    def indices(self, codes: Tensor) -> Tensor:
        """Codes [..., C] -> indices [...] int64."""
        digits = (codes.detach().float() * _row(self._middle, codes)).round().long() + self._integers(
            self._middle, codes
        )
        return (digits * self._integers(self.basis, codes)).sum(dim=-1)

    def codes(self, indices: Tensor) -> Tensor:
        """Indices [...] -> codes [..., C] fp32. Indices must lie in [0, vocabulary)."""
        digits = indices[..., None] // self._integers(self.basis, indices) % self._integers(self.levels, indices)
        middle = _row(self._middle, indices)
        return (digits - middle) / middle

    @property
    def _middle(self) -> tuple[int, ...]:
        return tuple(level // 2 for level in self.levels)

    @staticmethod
    def _integers(values: Sequence[int], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device)


def _row(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)
