"""Llama-style transformer blocks: pre-norm, bias-free, SwiGLU (arXiv 2002.05202), optional RMS norm on queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgen.layers.norm import RMSNorm


def llama_hidden(width: int, multiple_of: int = 256) -> int:
    """SwiGLU width of the Llama family: 8/3 of `width`, rounded up to a multiple of `multiple_of`."""
    return -(-int(8 * width / 3) // multiple_of) * multiple_of


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), dropout after w2."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class GatedMLP(nn.Module):
    """fc2(silu(fc1 x) * fc3 x) without biases: SwiGLU under the names of FlexTok's and FlexAR's files."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc3 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class FusedSwiGLU(nn.Module):
    """w3(silu(a) * b) with [a | b] = w12 x, and biases: SwiGLU under the names of DINOv2's files (MingTok). Dropout at the end."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.dropout(self.w3(F.silu(gate) * value))


class GeGLU(nn.Module):
    """fc2(gelu(fc1_g x) * fc1_x x) with biases, exact GELU (arXiv 2002.05202), under the names of xAR's files.

    Dropout behind the product and behind fc2.
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.fc1_g = nn.Linear(width, hidden)
        self.fc1_x = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1_g(x)) * self.fc1_x(x))))


class GeluMLP(nn.Module):
    """fc2(gelu(fc1 x)) with biases, dropout after both (ViT, RAR, TiTok). approximate: of GELU, "none" or "tanh" (DiT)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x), approximate=self.approximate))))


class Checkpointed:
    """For models with `gradient_checkpointing`: runs a block and, in training, forgets its activations until backward."""

    def _checkpointed(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]."""
    return rearrange(x, "b h n d -> b n (h d)")


def init_transformer(module: nn.Module, layers: int, std: float = 0.02) -> None:
    """N(0, std) for every linear and embedding; projections that write to the residual stream are divided by sqrt(2 layers).

    Residual scaling: GPT-2's rule, which keeps the variance of the stream independent of the depth.
    """
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            residual = name.endswith((".w2", ".output"))
            nn.init.normal_(part.weight, std=std / (2 * layers) ** 0.5 if residual else std)
            if getattr(part, "bias", None) is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, RMSNorm):
            torch.nn.init.ones_(part.weight)
