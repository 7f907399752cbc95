"""Sinusoidal features of a number: timesteps, scores (arXiv 1706.03762, section 3.5)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def angles(values: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """[n] -> [n, width // 2] fp32: value x period^(-2i / width), i from 0."""
    half = width // 2
    frequency = torch.exp(-math.log(period) * torch.arange(half, device=values.device) / half)
    return values.float()[:, None] * frequency


def cos_sin(values: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """[n] -> [n, width]: all cosines, then all sines (the order of ADM, DiT and MAR); a zero column if width is odd."""
    angle = angles(values, width, period)
    return F.pad(torch.cat((angle.cos(), angle.sin()), dim=-1), (0, width % 2))


def sin_cos(values: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """[n] -> [n, width]: all sines, then all cosines; a zero column if width is odd."""
    angle = angles(values, width, period)
    return F.pad(torch.cat((angle.sin(), angle.cos()), dim=-1), (0, width % 2))


def interleaved(values: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """[n] -> [n, width], width even: sine and cosine of every frequency side by side."""
    angle = angles(values, width, period)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)
