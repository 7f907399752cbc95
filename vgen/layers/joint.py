"""The joint block of MM-DiT (Stable Diffusion 3, arXiv 2403.03206, figure 2): two streams with weights of their own that attend together.

Both streams are modulated by one vector per row. Parameter names are those of diffusers' `JointTransformerBlock`, hence of
MaskGen's files. B rows, L image tokens, T text tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.layers.attention import attend
from vgen.layers.modulation import modulate
from vgen.layers.transformer import merge_heads, split_heads

EPS = 1e-6


class SixModulations(nn.Module):
    """Shift, scale and gate of the attention, then of the MLP, made of the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """[B, D] -> six tensors [B, 1, D]."""
        return self.linear(F.silu(condition))[:, None].chunk(6, dim=-1)


class ScaleShiftNorm(nn.Module):
    """LayerNorm modulated by (scale, shift) of the condition: the reverse of the blocks' order, as in the files."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, n, D], condition [B, D] -> [B, n, D]."""
        scale, shift = self.linear(F.silu(condition))[:, None].chunk(2, dim=-1)
        return modulate(normalise(x), shift, scale)


class TanhGELU(nn.Module):
    """gelu(proj x) in the tanh approximation."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., hidden]."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, tanh GELU, linear; four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        # The Identity stands where the files' authors have a dropout of 0: it keeps the index of the last layer.
        self.net = nn.Sequential(TanhGELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.net(x)


class JointAttention(nn.Module):
    """One softmax over image and text tokens, image first; every token sees every token. text_output: whether text is read on."""

    def __init__(self, width: int, heads: int, text_output: bool):
        super().__init__()
        self.heads = heads
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            setattr(self, name, nn.Linear(width, width))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width) if text_output else None

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """image [B, L, D], text [B, T, D] -> the same, projected; text None if it is not read on."""
        pairs = ((self.to_q, self.add_q_proj), (self.to_k, self.add_k_proj), (self.to_v, self.add_v_proj))
        query, key, value = (
            split_heads(torch.cat((own(image), added(text)), dim=1), self.heads) for own, added in pairs
        )
        attended = merge_heads(attend(query, key, value))
        length = image.shape[1]
        text = None if self.to_add_out is None else self.to_add_out(attended[:, length:])
        return self.to_out[0](attended[:, :length]), text


class JointBlock(nn.Module):
    """x += gate · attention(modulate(norm x)), then the same with the MLP, for both streams.

    last: the block after which the text is not needed: its text stream enters the attention, modulated by (scale, shift),
    and ends there.
    """

    def __init__(self, width: int, heads: int, last: bool = False):
        super().__init__()
        self.last = last
        self.norm1 = SixModulations(width)
        self.norm1_context = ScaleShiftNorm(width) if last else SixModulations(width)
        self.attn = JointAttention(width, heads, text_output=not last)
        self.ff = FeedForward(width)
        self.ff_context = None if last else FeedForward(width)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, L, D], text [B, T, D], condition [B, D] -> both streams; the text comes back unchanged from the last block."""
        shift, scale, *rest = self.norm1(condition)
        normed = modulate(normalise(x), shift, scale)
        if self.last:
            attended, _ = self.attn(normed, self.norm1_context(text, condition))
            return self._finish(x, attended, rest, self.ff), text
        text_shift, text_scale, *text_rest = self.norm1_context(condition)
        attended, text_attended = self.attn(normed, modulate(normalise(text), text_shift, text_scale))
        return (
            self._finish(x, attended, rest, self.ff),
            self._finish(text, text_attended, text_rest, self.ff_context),
        )

    @staticmethod
    def _finish(x: Tensor, attended: Tensor, parts: list[Tensor], mlp: FeedForward) -> Tensor:
        gate, shift, scale, mlp_gate = parts
        x = x + gate * attended
        return x + mlp_gate * mlp(modulate(normalise(x), shift, scale))


def normalise(x: Tensor) -> Tensor:
    """LayerNorm without weights, eps 1e-6, over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)
