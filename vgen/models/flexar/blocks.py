"""The parts of FlexAR's network: attention to the sequence and to a prompt, and the blocks made of them.

Parameter names are those of the published files. B batch, n slots at hand, P prompt tokens, H heads, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vgen.layers.attention import attend
from vgen.layers.cache import Memory
from vgen.layers.norm import RMSNorm
from vgen.layers.transformer import GatedMLP, merge_heads, split_heads

# kind -> norm of (width, whether it has a bias)
NORMS = {
    "layer": lambda width, bias: nn.LayerNorm(width, eps=1e-5, bias=bias),
    "rms": lambda width, bias: RMSNorm(width),
}


class SelfAttention(nn.Module):
    """One projection to queries, keys and values, optional norms of queries and keys per head."""

    def __init__(self, width: int, heads: int, bias: bool, qk_norm: bool, norm: str):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm, self.k_norm = (_head_norm(width // heads, qk_norm, norm) for _ in range(2))
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, slots: slice, kept: Memory | None) -> Tensor:
        """x [B, n, D] at the given slots sees those of the cache up to its own."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        query, key = self.q_norm(query), self.k_norm(key)
        if kept is not None:
            key, value = kept.extend(key, value)
        visible = None  # a single new slot sees everything
        if x.shape[1] > 1:
            visible = torch.ones(x.shape[1], slots.stop, dtype=torch.bool, device=x.device).tril(slots.start)
        return self.proj(merge_heads(attend(query, key, value, visible)))


class CrossAttention(nn.Module):
    """Queries from the sequence, keys and values from the projected prompt (not normalised before)."""

    def __init__(self, width: int, heads: int, bias: bool, qk_norm: bool, norm: str):
        super().__init__()
        self.heads = heads
        self.Wq, self.Wk, self.Wv, self.proj = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.q_norm, self.k_norm = (_head_norm(width // heads, qk_norm, norm) for _ in range(2))

    def memory(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, P, D/H] of a projected prompt [B, P, D]: the same for every slot."""
        return self.k_norm(split_heads(self.Wk(text), self.heads)), split_heads(self.Wv(text), self.heads)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [B, n, D]; mask [B, P], False on padding."""
        query = self.q_norm(split_heads(self.Wq(x), self.heads))
        return self.proj(merge_heads(attend(query, *memory, mask[:, None, None])))


class ClassBlock(nn.Module):
    """x += attention(norm x), then x += MLP(norm x)."""

    def __init__(self, width: int, heads: int, hidden: int, bias: bool, qk_norm: bool, norm: str, norm_bias: bool):
        super().__init__()
        self.norm_1, self.norm_2 = (NORMS[norm](width, norm_bias) for _ in range(2))
        self.attn = SelfAttention(width, heads, bias, qk_norm, norm)
        self.mlp = GatedMLP(width, hidden)

    def forward(self, x: Tensor, slots: slice, kept: Memory | None, memory: None, mask: None) -> Tensor:
        """[B, n, D] -> [B, n, D]; it has no prompt."""
        x = x + self.attn(self.norm_1(x), slots, kept)
        return x + self.mlp(self.norm_2(x))


class TextBlock(nn.Module):
    """As ClassBlock, with cross-attention to the prompt between the two."""

    def __init__(self, width: int, heads: int, hidden: int, bias: bool, qk_norm: bool, norm: str, norm_bias: bool):
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = (NORMS[norm](width, norm_bias) for _ in range(3))
        self.self_attn = SelfAttention(width, heads, bias, qk_norm, norm)
        self.cross_attn = CrossAttention(width, heads, bias, qk_norm, norm)
        self.mlp = GatedMLP(width, hidden)

    def forward(
        self, x: Tensor, slots: slice, kept: Memory | None, memory: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """[B, n, D] -> [B, n, D]; memory: `CrossAttention.memory`, mask [B, P]."""
        x = x + self.self_attn(self.norm_1(x), slots, kept)
        x = x + self.cross_attn(self.norm_2(x), memory, mask)
        return x + self.mlp(self.norm_3(x))


def _head_norm(size: int, present: bool, norm: str) -> nn.Module:
    return NORMS[norm](size, False) if present else nn.Identity()
