"""PAR: n tokens a call, one in each of n = M x M regions (arXiv 2412.15119), on the backbone of LlamaGen.

Tokens are numbered in PAR order: the first cell of every region one by one, then the same cell of all regions at once
(`regions` order). n - 1 learned tokens, inserted once behind the first n tokens, turn from one to n tokens a call. The
sequence is [class, tokens 0 … n-1, learned 0 … n-2, tokens n …]; the output at slot p predicts token p. From slot n on,
blocks of n slots see each other and everything before: n + N/n - 1 calls.

Canvas and training tokens are in raster order; this module permutes. Shapes as in llama_backbone.py, n tokens a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.layers.masks import group_visible, prefix_mask
from vgen.models.conditions.classes import CONDITIONINGS
from vgen.models.llama.backbone import LlamaBackbone, LlamaState, Plan, size_config
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.orders.registry import make_order
from vgen.samplers.predictions import Logits
from vgen.samplers.types import Canvas, Condition, Grid, Step, grid_size

# name: tokens a call. Sizes as in llama_backbone.SIZES; L-4x and XXL-16x are in the paper without released weights.
PARALLEL = {"4x": 4, "16x": 16}


def par_config(name: str) -> dict[str, Any]:
    """Constructor arguments of 'XL-4x', '3B-16x', … (384 x 384 pictures)."""
    size, _, parallel = name.partition("-")
    if parallel not in PARALLEL:
        raise VgenError(f"PAR sizes are written SIZE-4x or SIZE-16x, such as XL-4x, got {name!r}")
    return {**size_config(size), "parallel": PARALLEL[parallel], "grid": (1, 24, 24)}


class PARModel(LlamaBackbone, ModelMixin, ConfigMixin):
    """Generator of n tokens a call (module docstring); its mask is defined for one condition token only: a class, or words.

    parallel: n, a square number whose root divides both sides of the grid; the other arguments as in `LlamaGenModel`.
    """

    family = "PAR"
    size_config = staticmethod(par_config)

    @register_to_config
    def __init__(
        self,
        codes: int = 16384,
        grid: Sequence[int] = (1, 24, 24),
        parallel: int = 4,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        hidden: int | None = None,
        conditioning: str = "class",
        classes: int = 1000,
        condition_dropout: float = 0.1,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        theta: float = 10000.0,
    ):
        super().__init__()
        if parallel < 4 or math.isqrt(parallel) ** 2 != parallel:
            raise VgenError(f"PAR's tokens a call are a square number of at least 4 (4, 9, 16, ...), got {parallel}")
        self.build(CONDITIONINGS)
        self._check_grid(self.grid)
        self.spe_tok_embeddings = nn.ModuleDict({"special_embeddings": nn.Embedding(parallel - 1, width)})
        self.init_weights()

    def _check_grid(self, grid: Grid) -> None:
        side = math.isqrt(self.config.parallel)
        if grid[1] % side or grid[2] % side:
            raise VgenError(
                f"PAR with {self.config.parallel} tokens a call needs a grid whose sides are multiples of {side}, "
                f"got {grid[1]}x{grid[2]}"
            )

    @property
    def learned(self) -> Tensor:
        """The n - 1 learned tokens [n - 1, width]."""
        return self.spe_tok_embeddings["special_embeddings"].weight

    def default_order(self) -> BaseOrder:
        """The only order: regions-n."""
        return make_order("regions", self.grid, n=self.config.parallel)

    def check_order(self, order: BaseOrder) -> None:
        """Raises VgenError for every other order."""
        self._check_grid(order.grid)
        expected = make_order("regions", order.grid, n=self.config.parallel)
        if order.calls != expected.calls or not all(map(torch.equal, order.groups(), expected.groups())):
            raise VgenError(f"this PAR model decodes in the order {expected.name}, got {order.name!r}")

    @staticmethod
    def guidance(scale: float, interval: int = -1) -> ClassifierFree:
        """Constant guidance; interval: the released `cfg_interval`, which counts in each of the two phases."""
        return ClassifierFree(scale, limits=() if interval < 0 else (interval + 1, interval))

    # ---------------------------------------------------------------- training

    def sequence_logits(self, condition: Condition, tokens: Tensor) -> Tensor:
        """Logits [B, k + n, V] of [class, tokens 0 … n-1, learned, tokens n … k-1]; tokens [B, k] in PAR order, k >= n."""
        n = self.config.parallel
        prefix, _ = self._prefix(condition)
        x = self.tok_embeddings(tokens)
        learned = self.learned.expand(len(tokens), -1, -1)
        x = self.tok_dropout(torch.cat((prefix, x[:, :n], learned, x[:, n:]), dim=1))
        positions = torch.cat(self.default_order().groups())[: tokens.shape[1]]
        zero = torch.full((n - 1,), -1)
        rope = self.sequence_rope(torch.cat((positions[:n], zero, positions[n:])))
        mask = prefix_mask(group_visible(x.shape[1], n)).to(x.device)
        return self.output(self.norm(self.trunk(x, rope, mask)))

    def forward(self, condition: Condition, tokens: Tensor) -> Tensor:
        """Teacher-forced logits [B, N, V] in raster order; tokens [B, N] in raster order."""
        positions = torch.cat(self.default_order().groups()).to(tokens.device)
        logits = self.sequence_logits(condition, tokens[:, positions[:-1]])[:, : len(positions)]
        return logits[:, positions.argsort()]

    # ---------------------------------------------------------------- decoding (TokenModel)

    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> LlamaState:
        """As the backbone; PAR starts from an empty canvas."""
        self._check_grid(canvas.grid)
        if canvas.unknown_count() < grid_size(canvas.grid):
            raise VgenError("PAR decodes whole pictures: it takes no known tokens; use the native model or LlamaGen")
        return super().start(conditions, canvas)

    def plan(self, state: LlamaState, step: Step, canvas: Canvas) -> Plan:
        """The next slots; the learned tokens enter with the last of the first n tokens, in call n."""
        n, total = self.config.parallel, grid_size(canvas.grid)
        if step.size != (1 if step.index < n else n) or step.total != n + total // n - 1:
            raise VgenError(
                f"this PAR model decodes in the order regions-{n} ({n + total // n - 1} calls), the order at hand asks for "
                f"{step.size} tokens in call {step.index} of {step.total}"
            )
        rope = torch.zeros_like(state.rope[:1])
        if step.index > 0:
            rope = state.rope[canvas.fresh.repeat(state.rows, 1)]
        if step.index == n:
            rope = torch.cat((rope, torch.zeros_like(rope).expand(-1, n - 1, -1, -1)), dim=1)
        return self.next_slots(state, rope)

    def run(self, state: LlamaState, plan: Plan, x: Tensor) -> Tensor:
        """Feeds x [R * B, f, width]; every output answers one target: logits [R * B, f, V]. Device only."""
        return self.output(self.norm(self.extend(state, plan, x)))

    @torch.no_grad()
    def predict(self, state: LlamaState, step: Step, canvas: Canvas) -> Logits:
        """One call of the backbone."""
        plan = self.plan(state, step, canvas)
        x = state.prefix if step.index == 0 else self.embed_fresh(state, canvas)
        if step.index == self.config.parallel:
            x = torch.cat((x, self.learned.expand(len(x), -1, -1).to(x)), dim=1)
        logits = self.run(state, plan, x)
        state.length = plan.slots.stop
        state.counters.add(x.shape[0], x.shape[1])
        return Logits(rearrange(logits.float(), "(r b) m v -> r b m v", r=state.rows))
