"""NAR: next-neighbor prediction, a whole anti-diagonal a call (arXiv 2503.10696), on the backbone of LlamaGen.

Every token predicts its right neighbor (head `output`, after the trunk) and the one below (head `medusa_output`, after
one more block); where two neighbors predict a token, their logits are averaged. The first token is the average of both
heads at the last condition token. Tokens of one diagonal see each other, in training and in decoding, so both give the
same logits: H + W - 1 calls.

Any H x W grid works; published models are square. Shapes as in llama_backbone.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.layers.masks import step_causal_mask
from vgen.layers.norm import RMSNorm
from vgen.models.llama.backbone import CONDITIONINGS, LlamaBackbone, LlamaState, Plan
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.orders.registry import make_order
from vgen.samplers.predictions import Logits
from vgen.samplers.types import Canvas, Condition, Step, grid_size


class NARModel(LlamaBackbone, ModelMixin, ConfigMixin):
    """Class- or text-conditional generator of a diagonal a call (module docstring).

    Arguments as in `LlamaGenModel`; `depth` is that of the trunk: there is one block more.
    """

    family = "NAR"

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
        self.build(CONDITIONINGS, prefix_tokens, extra_layers=1)
        self.medusa_norm = RMSNorm(width)
        self.medusa_output = nn.Linear(width, codes, bias=False)
        self.init_weights()  # as released: only the first head starts at zero

    def default_order(self) -> BaseOrder:
        """The only order: neighbor."""
        return make_order("neighbor", self.grid)

    def check_order(self, order: BaseOrder) -> None:
        """Raises VgenError for every other order."""
        expected = make_order("neighbor", order.grid)
        if order.calls != expected.calls or not all(map(torch.equal, order.groups(), expected.groups())):
            raise VgenError(f"NAR decodes in the order neighbor, got {order.name!r}")

    @staticmethod
    def guidance(scale: float, interval: int = -1) -> ClassifierFree:
        """Constant guidance; interval: the released `cfg_interval`, the most tokens decoded before a guided call."""
        return ClassifierFree(scale, limits=() if interval < 0 else (interval,))

    # ---------------------------------------------------------------- training

    def sequence_logits(self, condition: Condition, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both heads [B, T + N, V] (right, below) of the sequence [condition, tokens [B, N]]."""
        prefix, text_mask = self._prefix(condition)
        x = self.tok_dropout(torch.cat((prefix, self.tok_embeddings(tokens)), dim=1))
        rope = self.sequence_rope(torch.arange(tokens.shape[1]))
        mask = step_causal_mask(self.default_order().step_ids(), self.prefix_tokens).to(x.device)
        mask = self.sequence_mask(mask, text_mask)
        x = self.trunk(x, rope, mask, slice(0, self.config.depth))
        right = self.output(self.norm(x))
        x = self.trunk(x, rope, mask, slice(self.config.depth, None))
        return right, self.medusa_output(self.medusa_norm(x))

    def forward(self, condition: Condition, tokens: Tensor) -> Tensor:
        """Teacher-forced, averaged logits [B, N, V] of every token; tokens [B, N] in raster order."""
        right, below = (part[:, self.prefix_tokens - 1 :].float() for part in self.sequence_logits(condition, tokens))
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        mixed = mix_neighbors(right[:, 1:], below[:, 1:], positions, positions, self.grid[2])
        return torch.cat((((right + below) / 2)[:, :1], mixed[:, 1:]), dim=1)

    # ---------------------------------------------------------------- decoding (TokenModel)

    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> LlamaState:
        """As the backbone; NAR starts from an empty canvas."""
        if canvas.unknown_count() < grid_size(canvas.grid):
            raise VgenError("NAR decodes whole pictures: it takes no known tokens; use the native model or LlamaGen")
        return super().start(conditions, canvas)

    def plan(self, state: LlamaState, step: Step, canvas: Canvas) -> Plan:
        """The next slots: the condition, or the diagonal that the last step wrote."""
        _, height, width = canvas.grid
        diagonal = min(step.index + 1, height, width, height + width - 1 - step.index)
        if step.size != diagonal or step.total != height + width - 1:
            raise VgenError(
                f"NAR decodes in the order neighbor ({height + width - 1} calls), the order at hand asks for {step.size} tokens "
                f"in call {step.index} of {step.total}"
            )
        rope = torch.zeros_like(state.rope[:1]).expand(self.prefix_tokens, -1, -1)
        return self.next_slots(state, rope if step.index == 0 else state.rope[canvas.fresh.repeat(state.rows, 1)])

    def run(self, state: LlamaState, plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feeds x [R * B, f, width]: logits of both heads, fp32 [R * B, f, V]. Device only."""
        x = self.extend(state, plan, x, slice(0, self.config.depth))
        right = self.output(self.norm(x)).float()
        x = self.extend(state, plan, x, slice(self.config.depth, None))
        return right, self.medusa_output(self.medusa_norm(x)).float()

    @torch.no_grad()
    def predict(self, state: LlamaState, step: Step, canvas: Canvas) -> Logits:
        """One call of the backbone."""
        plan = self.plan(state, step, canvas)
        x = state.prefix if step.index == 0 else self.embed_fresh(state, canvas)
        right, below = self.run(state, plan, x)
        if step.index == 0:
            logits = ((right + below) / 2)[:, -1:]
        else:  # every sample has the same diagonal: neighbors are matched once
            logits = mix_neighbors(right, below, canvas.fresh[0], step.targets, canvas.grid[2])
        state.length = plan.slots.stop
        state.counters.add(x.shape[0], x.shape[1])
        return Logits(rearrange(logits, "(r b) m v -> r b m v", r=state.rows))


def mix_neighbors(right: Tensor, below: Tensor, fed: Tensor, targets: Tensor, width: int) -> Tensor:
    """Logits [B, m, V] of `targets` [m]: the mean of what their left neighbor says of its right and the upper one of below.

    right, below: [B, f, V] outputs at the positions `fed` [f]; a neighbor outside the grid does not count. Position 0 has
    none: its row is zero.
    """
    left = (fed == (targets - 1)[:, None]) & (targets % width > 0)[:, None]  # [m, f], at most one per row
    above = fed == (targets - width)[:, None]
    total = right[:, left.int().argmax(dim=1)] * left.any(dim=1)[:, None]
    total = total + below[:, above.int().argmax(dim=1)] * above.any(dim=1)[:, None]
    return total / (left.any(dim=1).int() + above.any(dim=1).int()).clamp_min(1)[:, None]
