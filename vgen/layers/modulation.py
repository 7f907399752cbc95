"""Self-attention, and transformer blocks whose norms are modulated *per token* (adaLN-zero of DiT, arXiv 2212.09748,
section 3.2): RAR, DAR.

The condition of a token (class and step in RAR, class and direction in DAR) gives a shift, a scale and a gate for its
attention and for its MLP. B rows, n tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from vgen.layers.attention import Mask, attend
from vgen.layers.cache import Memory
from vgen.layers.rope2d import rotate_pairs
from vgen.layers.transformer import merge_heads, split_heads


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


class Modulation(nn.Sequential):
    """SiLU, then a linear layer to `parts` vectors of the model's width; zero at the start, so that gates start closed."""

    def __init__(self, width: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))

    def reset_parameters(self) -> None:
        """Zeros."""
        nn.init.zeros_(self[1].weight)
        nn.init.zeros_(self[1].bias)


class FinalNorm(nn.Module):
    """LayerNorm without weights, modulated. Its linear layer gives (scale, shift): the reverse of the blocks' order."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=eps, elementwise_affine=False)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x, condition [B, n, D] -> [B, n, D]."""
        scale, shift = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other, or to a cache that they enter; who sees whom is the caller's.

    bias: of both projections (proj_bias: of the output's alone, where it differs); norm_eps: LayerNorm of this eps over every head's queries and keys (None: no norm).
    """

    def __init__(
        self, width: int, heads: int, bias: bool, norm_eps: float | None = None, proj_bias: bool | None = None
    ):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        size = width // heads
        self.q_norm = nn.Identity() if norm_eps is None else nn.LayerNorm(size, eps=norm_eps)
        self.k_norm = nn.Identity() if norm_eps is None else nn.LayerNorm(size, eps=norm_eps)
        self.proj = nn.Linear(width, width, bias=bias if proj_bias is None else proj_bias)

    def project(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n, D] -> queries, keys, values [B, H, n, D/H]; normalised, then rotated by a table of rope2d.py."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        query, key = self.q_norm(query), self.k_norm(key)
        return (query, key, value) if rope is None else (rotate_pairs(query, rope), rotate_pairs(key, rope), value)

    def forward(
        self,
        x: Tensor,
        mask: Mask = None,
        rope: Tensor | None = None,
        memory: Memory | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """[B, n, D] -> [B, n, D].

        mask: True where visible (None: everything), over the slots 0 … end of `memory`'s slice, or over the n tokens
        without a memory; dropout: of the attention weights.
        """
        query, key, value = self.project(x, rope)
        if memory is not None:
            key, value = memory.extend(key, value)
        return self.proj(merge_heads(attend(query, key, value, mask, dropout)))


class ModulatedBlock(nn.Module):
    """x += gate · attention(modulate(norm x)), then the same with the MLP.

    affine: whether the norms have weights of their own; dropout: of the attention's output (the MLP brings its own);
    attention_dropout: of the attention weights.
    """

    def __init__(
        self,
        attention: SelfAttention,
        mlp: nn.Module,
        affine: bool,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        width = attention.proj.out_features
        self.attention_dropout = attention_dropout
        self.norm1 = nn.LayerNorm(width, eps=eps, elementwise_affine=affine)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=eps, elementwise_affine=affine)
        self.mlp = mlp
        self.adaLN_modulation = Modulation(width, 6)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        mask: Tensor | None,
        rope: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """[B, n, D] -> [B, n, D]; mask and memory as in SelfAttention.

        modulation: [B, n, 6D], what `adaLN_modulation` makes of every token's condition (callers may keep it).
        """
        # The order of the chunks is that of DiT; RAR's head has (scale, shift) instead.
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        dropout = self.attention_dropout if self.training else 0.0
        attended = self.attn(modulate(self.norm1(x), shift1, scale1), mask, rope, memory, dropout)
        x = x + gate1 * self.dropout(attended)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
