"""The pre-norm block of vision transformers (arXiv 2010.11929), and U-ViT's variant with a long skip (arXiv 2209.12152).

B rows, N tokens, D width. Parameter names are those of timm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vgen.layers.attention import Mask
from vgen.layers.cache import Memory
from vgen.layers.modulation import SelfAttention
from vgen.layers.transformer import GeluMLP


class ViTBlock(nn.Module):
    """x += attention(norm x), then x += MLP(norm x); every token sees every token unless a mask says otherwise.

    mlp: its class (width, hidden, dropout); bias: of the query, key and value projections (the other projections always
    have one); dropout: of the attention's output and in the MLP; attention_dropout: of the attention weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        eps: float,
        mlp: Callable[[int, int, float], nn.Module] = GeluMLP,
        bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        self.attention_dropout = attention_dropout
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads, bias=bias, proj_bias=True)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp(width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Mask = None, memory: Memory | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; mask and memory as in SelfAttention."""
        dropout = self.attention_dropout if self.training else 0.0
        x = x + self.dropout(self.attn(self.norm1(x), mask, memory=memory, dropout=dropout))
        return x + self.mlp(self.norm2(x))


class SkipBlock(ViTBlock):
    """A block of U-ViT's second half: first reads the output of its counterpart in the first half."""

    def __init__(self, width: int, heads: int, hidden: int, **options):
        super().__init__(width, heads, hidden, **options)
        self.skip_linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x, skip [B, N, D] -> [B, N, D]."""
        return super().forward(self.skip_linear(torch.cat((x, skip), dim=-1)))
