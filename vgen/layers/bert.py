"""The block of BERT (arXiv 1810.04805): post-norm, i.e. every sum with a residual is normalised.

B rows, N tokens, D width. Parameter names are those of the Hugging Face implementation, hence of TiTok's MaskGIT files.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vgen.layers.attention import attend
from vgen.layers.transformer import merge_heads, split_heads

EPS = 1e-12  # of every norm


class ResidualOutput(nn.Module):
    """norm(x + dropout(dense h))."""

    def __init__(self, inner: int, width: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """h [B, N, inner], x [B, N, D] -> [B, N, D]."""
        return self.LayerNorm(x + self.dropout(self.dense(h)))


class BertBlock(nn.Module):
    """norm(x + attention x), then norm(x + MLP x); every token sees every token."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, attention_dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": ResidualOutput(width, width, dropout)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = ResidualOutput(hidden, width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        query, key, value = (split_heads(part(x), self.heads) for part in self.attention["self"].values())
        attended = attend(query, key, value, dropout=self.attention_dropout if self.training else 0.0)
        x = self.attention["output"](merge_heads(attended), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)
