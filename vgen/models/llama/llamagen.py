"""LlamaGen: a Llama over raster tokens, conditioned on a class or on FLAN-T5 features (arXiv 2406.06525).

The sequence is [T condition tokens, N tokens in raster order]; the output at a token predicts the next one, the last
condition token predicts the first.

LlamaGen follows every order whose steps carry a `Feed`: raster, and ZipAR's rows side by side (no retraining). Slots of
the cache are raster slots; a query sees the slots up to its own that hold a token.

Shapes as in llama_backbone.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange, repeat
from torch import Tensor

from vgen.errors import VgenError
from vgen.layers.rope2d import take_rows
from vgen.models.llama.backbone import CONDITIONINGS, LlamaBackbone, LlamaState, Plan
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.orders.registry import make_order
from vgen.samplers.predictions import Logits
from vgen.samplers.types import Canvas, Condition, Step


class LlamaGenModel(LlamaBackbone, ModelMixin, ConfigMixin):
    """Class- or text-conditional next-token generator (module docstring).

    codes: visual vocabulary; grid: (H, W) or (1, H, W) of training; width, depth (number of blocks), heads: as in SIZES; hidden: SwiGLU
    width (default 8/3 of the width, rounded up to 256). conditioning: class, words (`ClassConditional`) or text (caption_width and
    caption_tokens of the features; prefix_tokens: how many of them enter, default all). condition_dropout: share of
    unconditional samples in training, 0: no null condition. The dropouts are those of the published training.
    """

    family = "LlamaGen"

    @register_to_config
    def __init__(
        self,
        codes: int = 16384,
        grid: Sequence[int] = (1, 16, 16),
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int | None = None,
        conditioning: str = "class",
        classes: int = 1000,
        caption_width: int = 2048,
        caption_tokens: int = 120,
        prefix_tokens: int | None = None,
        condition_dropout: float = 0.1,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        theta: float = 10000.0,
    ):
        super().__init__()
        self.build(CONDITIONINGS, prefix_tokens)
        self.init_weights()

    # ---------------------------------------------------------------- training

    def sequence_logits(self, condition: Condition, tokens: Tensor, outputs: slice = slice(None)) -> Tensor:
        """Logits [B, T + n, V] of the sequence [condition, tokens [B, n]], n <= N; `outputs`: which of them."""
        prefix, prefix_mask = self._prefix(condition)
        x = self.tok_dropout(torch.cat((prefix, self.tok_embeddings(tokens)), dim=1))
        rope = self.sequence_rope(torch.arange(tokens.shape[1]))
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        x = self.trunk(x, rope, self.sequence_mask(causal, prefix_mask))
        return self.output(self.norm(x[:, outputs]))

    def forward(self, condition: Condition, tokens: Tensor) -> Tensor:
        """Teacher-forced logits [B, N, V] of every token [B, N] given those before it; the last token is not fed."""
        return self.sequence_logits(condition, tokens[:, :-1], slice(self.prefix_tokens - 1, None))

    # ---------------------------------------------------------------- decoding (TokenModel)

    @staticmethod
    def guidance(scale: float, interval: int = -1) -> ClassifierFree:
        """Constant guidance; interval: the released `cfg_interval`, the last decode call that is guided (-1: all).

        ZipAR's release counts its first row and then the tokens of all others anew, with one token less.
        """
        return ClassifierFree(scale, limits=() if interval < 0 else (interval + 1, interval))

    def default_order(self) -> BaseOrder:
        """Raster."""
        return make_order("raster", self.grid)

    def check_order(self, order: BaseOrder) -> None:
        """Raises VgenError for an order that a next-token model cannot follow."""
        step = next(iter(order.steps(Canvas.blank(order.grid, 1))))
        if step.feed is None:
            raise VgenError(_not_next_token(f"order {order.name!r}"))

    def plan(self, state: LlamaState, step: Step) -> Plan:
        """Slots, rope rows and visibility of what `step.feed` names; the first call feeds the condition, too."""
        if step.feed is None:
            raise VgenError(_not_next_token("this order (or known tokens that differ between samples)"))
        feed, device = step.feed, self.device
        prefix = self.prefix_tokens if step.index == 0 else 0
        positions = feed.slot[1:] if prefix else feed.slot  # the condition is the first entry of the first step
        front = torch.full((prefix,), -1, device=device)
        slots = torch.cat((torch.arange(prefix, device=device), self.prefix_tokens + positions))
        state.filled[slots] = True
        every = torch.arange(len(state.filled), device=device)
        mask = every <= slots[:, None]  # [f, slots]
        # ZipAR's release shows slots without a token as zero keys and values: they take a share of the attention.
        mask = mask if feed.blanks else mask & state.filled
        if self.prefix_tokens > 1:
            text = F.pad(state.prefix_mask, (0, len(every) - self.prefix_tokens), value=True)
            mask = (mask & text[:, None, None, :]) | (every == slots[:, None])
        return Plan(
            take_rows(state.rope, torch.cat((front, positions))),
            slots,
            len(every),
            mask,
            feed.reads + (prefix - 1 if prefix else 0),
        )

    def run(self, state: LlamaState, plan: Plan, x: Tensor) -> Tensor:
        """Feeds x [R * B, f, width] and answers the targets: logits [R * B, m, V]. Device only."""
        return self.output(self.norm(self.extend(state, plan, x)[:, plan.reads]))

    @torch.no_grad()
    def predict(self, state: LlamaState, step: Step, canvas: Canvas) -> Logits:
        """One call of the backbone."""
        plan = self.plan(state, step)
        first = step.index == 0
        values = canvas.values[:, step.feed.source[1:] if first else step.feed.source]
        x = self.tok_embeddings(repeat(values, "b f -> (r b) f", r=state.rows))
        x = torch.cat((state.prefix, x), dim=1) if first else x
        logits = self.run(state, plan, x)
        state.counters.add(x.shape[0], x.shape[1])
        return Logits(rearrange(logits.float(), "(r b) m v -> r b m v", r=state.rows))


def _not_next_token(what: str) -> str:
    return f"LlamaGen predicts a token from the one before it, but {what} has no feed for that; use raster or zip"
