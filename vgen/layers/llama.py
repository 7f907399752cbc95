"""The transformer block of LlamaGen (arXiv 2406.06525), PAR and NAR: pre-norm, bias-free, SwiGLU, 2-D rope.

Parameter names are those of the published files. B rows, n tokens, H heads, D head size.
"""

from __future__ import annotations

from torch import Tensor, nn

from vgen.layers.attention import Mask, attend
from vgen.layers.cache import Memory
from vgen.layers.norm import RMSNorm
from vgen.layers.rope2d import rotate_pairs
from vgen.layers.transformer import SwiGLU, merge_heads, split_heads


class LlamaAttention(nn.Module):
    """One projection to queries, keys and values (in this order, heads contiguous), one back; dropout after it."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, attention_dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.attention_dropout = attention_dropout
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor, mask: Mask, memory: Memory | None = None) -> Tensor:
        """x [B, n, width]; rope: a table of rope2d.py, zero rows for condition tokens; mask over the slots that are read."""
        query, key, value = (split_heads(part, self.heads) for part in self.wqkv(x).chunk(3, dim=-1))
        query, key = rotate_pairs(query, rope), rotate_pairs(key, rope)
        if memory is not None:
            key, value = memory.extend(key, value)
        attended = attend(query, key, value, mask, self.attention_dropout if self.training else 0.0)
        return self.dropout(self.wo(merge_heads(attended)))


class LlamaBlock(nn.Module):
    """x += attention(norm x), then x += SwiGLU(norm x)."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        residual_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = LlamaAttention(width, heads, residual_dropout, attention_dropout)
        self.ffn_norm = RMSNorm(width)
        self.feed_forward = SwiGLU(width, hidden, ffn_dropout)

    def forward(self, x: Tensor, rope: Tensor, mask: Mask, memory: Memory | None = None) -> Tensor:
        """[B, n, width] -> [B, n, width]; arguments as `LlamaAttention`."""
        x = x + self.attention(self.attention_norm(x), rope, mask, memory)
        return x + self.feed_forward(self.ffn_norm(x))
