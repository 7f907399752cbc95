"""Scaled dot-product attention and the step-causal mask shared by training and decoding of the native model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask | None


@cache
def _flex():
    return torch.compile(flex_attention, dynamic=False)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over [B, H, N, D] heads.

    mask: None (all visible), a boolean tensor broadcastable to [B, H, Nq, Nk] (True: visible), or a FlexAttention
    BlockMask (compiled on CUDA; eager elsewhere, which is correct but slow). dropout: share of the attention weights
    that is dropped (pass 0 outside training; a BlockMask takes none).
    """
    if isinstance(mask, BlockMask):
        return (_flex() if query.is_cuda else flex_attention)(query, key, value, block_mask=mask)
    if query.device.type == "cpu" and torch.is_grad_enabled():
        return _attend_explicitly(query, key, value, mask, dropout)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def _attend_explicitly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The same in two matrix products: on CPU the fused kernel's backward takes 4 times as long at a few hundred tokens."""
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1).to(value.dtype)
    return (F.dropout(weights, dropout) if dropout else weights) @ value


@dataclass(frozen=True)
class StepCausal:
    """Who sees whom: every slot has a time, and sees slots of its own time or earlier.

    times: [B, P + N] int64: prefix slot i has time i - P - 1 (so the prefix is causal and every visual token sees all of
    it), visual tokens have the index of their decoding step, -1 for given context. valid: [B, P + N] bool, False on
    prefix padding.
    The content stack uses `<=` (tokens of one step see each other), queries use `<` (a step sees only earlier steps).
    """

    times: Tensor
    valid: Tensor
    prefix: int

    @classmethod
    def build(cls, prefix_mask: Tensor, step_ids: Tensor) -> StepCausal:
        """prefix_mask [B, P] bool, step_ids [B, N] int64."""
        batch, prefix = prefix_mask.shape
        negative = torch.arange(-prefix - 1, -1, device=step_ids.device).expand(batch, -1)
        valid = torch.cat((prefix_mask, torch.ones_like(step_ids, dtype=torch.bool)), dim=1)
        return cls(torch.cat((negative, step_ids), dim=1), valid, prefix)

    def content_dense(self) -> Tensor:
        """[B, 1, P + N, P + N] bool."""
        return (self.valid[:, None, :] & (self.times[:, None, :] <= self.times[:, :, None]))[:, None]

    def query_dense(self) -> Tensor:
        """[B, 1, N, P + N] bool."""
        targets = self.times[:, self.prefix :, None]
        return (self.valid[:, None, :] & (self.times[:, None, :] < targets))[:, None]

    def content_blocks(self) -> BlockMask:
        """The same mask as `content_dense` for FlexAttention."""

        def visible(b, h, q, k):
            return self.valid[b, k] & (self.times[b, k] <= self.times[b, q])

        batch, length = self.times.shape
        return create_block_mask(visible, batch, None, length, length, device=self.times.device)

    def query_blocks(self) -> BlockMask:
        """The same mask as `query_dense` for FlexAttention."""

        def visible(b, h, q, k):
            return self.valid[b, k] & (self.times[b, k] < self.times[b, q + self.prefix])

        batch, length = self.times.shape
        return create_block_mask(visible, batch, None, length - self.prefix, length, device=self.times.device)
