"""The native model: one checkpoint for every decode order.

Text and visual tokens share one sequence with MM-RoPE positions (Lumos-1, arXiv 2507.08801). Two stacks, after the
two-pass decoding of ARPG (arXiv 2503.10568): the *content* stack runs over the prefix and the tokens decoded so far; its
normalised output is turned once into shared keys and values; the *query* stack holds one position-only query per target
(a learned vector rotated to the target position, as in RandAR, arXiv 2412.01827), which cross-attends to them.

Unlike ARPG, training uses the mask that decoding uses: content tokens of one step see each other, queries see earlier
steps only (`StepCausal`). So cached decoding equals the training forward for any order and any number of steps.

Shapes: B batch, R guidance rows, P prefix slots, N positions, m targets of a step, f fed tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.errors import VgenError, nearest
from vgen.layers.attention import Mask, StepCausal, attend
from vgen.layers.cache import KVCache
from vgen.layers.mmrope import rope_tables, rotate, text_positions, visual_positions
from vgen.layers.norm import RMSNorm
from vgen.layers.transformer import Checkpointed, SwiGLU, init_transformer, llama_hidden, merge_heads, split_heads
from vgen.models.base import Generator
from vgen.models.conditions.vocabulary import SavesVocabulary, Vocabulary
from vgen.samplers.orders import make_order
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.predictions import Logits
from vgen.samplers.types import Canvas, Condition, Counters, Grid, Step, grid_coordinates, grid_size

# name: (width, content layers, query layers, heads); ffn width 8/3, rounded up to 64. Parameters without the embeddings.
SIZES = {
    "XXS": (192, 4, 4, 3),  # 3.5 M
    "XS": (256, 4, 4, 4),  # 6 M: the shipped emoji model
    "S": (384, 6, 6, 6),  # 19 M
    "B": (768, 8, 8, 12),  # 104 M
    "L": (1024, 14, 14, 16),  # 325 M
    "XL": (1280, 19, 19, 20),  # 690 M
}

Tables = tuple[Tensor, Tensor]


def size_config(size: str) -> dict[str, int]:
    """Constructor arguments of a named size (`SIZES`)."""
    if size not in SIZES:
        raise VgenError(f"unknown model size {size!r}{nearest(size, SIZES)}; sizes: {', '.join(SIZES)}")
    return dict(zip(("width", "content_layers", "query_layers", "heads"), SIZES[size]))


class ContentBlock(nn.Module):
    """Self attention over prefix and decoded tokens, then SwiGLU."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = RMSNorm(width // heads)
        self.key_norm = RMSNorm(width // heads)
        self.output = nn.Linear(width, width, bias=False)
        self.ffn_norm = RMSNorm(width)
        self.ffn = SwiGLU(width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def project(self, x: Tensor, rope: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n, width] -> rotated queries and keys, values: [B, H, n, D] each."""
        query, key, value = (
            split_heads(part, self.heads) for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        return rotate(self.query_norm(query), rope), rotate(self.key_norm(key), rope), value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual sums after attention [B, H, n, D]."""
        x = x + self.dropout(self.output(merge_heads(attended)))
        return x + self.ffn(self.ffn_norm(x))

    def forward(self, x: Tensor, rope: Tables, mask: Mask) -> Tensor:
        """The whole block without a cache. Training calls the module itself: FSDP2 hooks on to forward."""
        return self.finish(x, attend(*self.project(x, rope), mask))


class QueryBlock(nn.Module):
    """Cross attention of target queries to the shared keys and values, then SwiGLU. Queries never see each other."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm = RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.query_norm = RMSNorm(width // heads)
        self.output = nn.Linear(width, width, bias=False)
        self.ffn_norm = RMSNorm(width)
        self.ffn = SwiGLU(width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z: Tensor, rope: Tables, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        """z [B, m, width]; key, value [B, H, slots, D]."""
        query = rotate(self.query_norm(split_heads(self.query(self.attention_norm(z)), self.heads)), rope)
        z = z + self.dropout(self.output(merge_heads(attend(query, key, value, mask))))
        return z + self.ffn(self.ffn_norm(z))


@dataclass
class AnyOrderState:
    """Memory of one run: caches addressed in decode order behind the P prefix slots (keys carry their positions by RoPE)."""

    cache: KVCache  # content layers, then one layer of shared keys and values
    prefix_mask: Tensor  # [R * B, P] bool
    offset: Tensor  # [R * B] sequence index of the first visual token
    coordinates: Tensor  # [N, 3]: the grid's, by position
    length: int  # slots filled so far
    rows: int  # R
    counters: Counters


@dataclass(frozen=True)
class Plan:
    """What one call needs, all shapes static for a given (fed, targets) size: grid coordinates of fed tokens and targets."""

    fed: Tensor | None  # [R * B, f, 3]
    targets: Tensor  # [R * B, m, 3]
    slots: slice


class AnyOrderModel(SavesVocabulary, Checkpointed, Generator, ModelMixin, ConfigMixin):
    """Any-order generator over discrete visual tokens, conditioned on captions or classes (module docstring).

    vocabulary_size: prefix ids (`Vocabulary`); codes: visual vocabulary; grid: default (T, H, W); prefix_limit: longest
    prefix with its `<start>`; width must be heads * head size, head size a multiple of 32.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("ContentBlock", "QueryBlock")
    _no_split_modules = ("ContentBlock", "QueryBlock")

    @register_to_config
    def __init__(
        self,
        vocabulary_size: int,
        codes: int,
        grid: Sequence[int] = (1, 16, 16),
        prefix_limit: int = 16,
        width: int = 256,
        content_layers: int = 4,
        query_layers: int = 4,
        heads: int = 4,
        hidden: int | None = None,
        theta: float = 10000.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        if width % heads or (width // heads) % 32:
            raise VgenError(
                f"width {width} over {heads} heads must give a head size that is a multiple of 32, got {width / heads:g}"
            )
        hidden = hidden or llama_hidden(width, 64)
        self.set_grids(grid)
        self.vocabulary: Vocabulary | None = None
        self.prefix_embedding = nn.Embedding(vocabulary_size, width)
        self.code_embedding = nn.Embedding(codes, width)
        self.target = nn.Parameter(torch.empty(width))  # what every query starts from, before its rotation
        self.embedding_dropout = nn.Dropout(dropout)
        self.content = nn.ModuleList(ContentBlock(width, heads, hidden, dropout) for _ in range(content_layers))
        self.content_norm = RMSNorm(width)
        self.shared = nn.Linear(width, 2 * width, bias=False)  # keys and values for all query blocks
        self.shared_norm = RMSNorm(width // heads)
        self.queries = nn.ModuleList(QueryBlock(width, heads, hidden, dropout) for _ in range(query_layers))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, codes, bias=False)
        self.gradient_checkpointing = False
        init_transformer(self, content_layers + query_layers)
        nn.init.normal_(self.target, std=0.02)
        nn.init.zeros_(self.head.weight)  # the first loss is ln(codes)

    # ---------------------------------------------------------------- shared by training and decoding

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.config.width // self.config.heads

    def _rope(self, positions: Tensor) -> Tables:
        return rope_tables(positions, self.head_dim, self.config.theta)

    def _start_queries(self, coordinates: Tensor) -> Tensor:
        """The learned target vector rotated to grid coordinates [B, m, 3] -> [B, m, width]; the offset stays out of it."""
        zero = torch.zeros(coordinates.shape[0], dtype=torch.long, device=coordinates.device)
        heads = rearrange(self.target, "(h d) -> 1 h 1 d", h=self.config.heads)
        return merge_heads(rotate(heads, self._rope(visual_positions(coordinates, zero))))

    def _share(self, content: Tensor, rope: Tables) -> tuple[Tensor, Tensor]:
        """Keys and values for the query stack, [B, H, n, D] each, from the normalised content output."""
        key, value = (
            split_heads(part, self.config.heads) for part in self.shared(self.content_norm(content)).chunk(2, dim=-1)
        )
        return rotate(self.shared_norm(key), rope), value

    # ---------------------------------------------------------------- training

    def forward(self, condition: Condition, tokens: Tensor, step_ids: Tensor, grid: Grid | None = None) -> Tensor:
        """Teacher-forced logits of every position given the steps before its own.

        tokens: [B, N] int64 in raster order; step_ids: [B, N] int64, the decoding step of every position.
        Returns [B, N, codes]. Tokens stay in raster order: positions and the mask carry the decode order.
        """
        grid = grid or self.grid
        prefix_mask = condition.mask.to(tokens.device)
        batch, prefix = prefix_mask.shape
        coordinates = grid_coordinates(grid, tokens.device).expand(batch, -1, -1)
        visual = visual_positions(coordinates, prefix_mask.sum(dim=1))  # [B, N, 3]
        text = text_positions(prefix, tokens.device).expand(batch, -1, -1)
        rope = self._rope(torch.cat((text, visual), dim=1))
        mask = StepCausal.build(prefix_mask, step_ids)
        content_mask, query_mask = (
            (mask.content_blocks(), mask.query_blocks())
            if tokens.is_cuda
            else (mask.content_dense(), mask.query_dense())
        )

        x = torch.cat((self.prefix_embedding(condition.ids.to(tokens.device)), self.code_embedding(tokens)), dim=1)
        x = self.embedding_dropout(x)
        for block in self.content:
            x = self._checkpointed(block, x, rope, content_mask)
        key, value = self._share(x, rope)

        query_rope = self._rope(visual)
        z = self._start_queries(coordinates)
        for block in self.queries:
            z = self._checkpointed(block, z, query_rope, key, value, query_mask)
        return self.head(self.norm(z))

    def loss(self, condition: Condition, tokens: Tensor, step_ids: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy in nats per token, fp32, over all positions that have a step (step_ids >= 0).

        Positions with a negative step id are given context (an inpainting task): visible to all, not predicted.
        """
        logits = self(condition, tokens, step_ids)
        targets = torch.where(step_ids >= 0, tokens, -100)
        loss = F.cross_entropy(rearrange(logits.float(), "b n v -> b v n"), targets, ignore_index=-100)
        with torch.no_grad():
            right = (logits.argmax(dim=-1) == tokens) & (step_ids >= 0)
            accuracy = right.sum() / (step_ids >= 0).sum().clamp_min(1)
        return {"loss": loss, "accuracy": accuracy}

    # ---------------------------------------------------------------- decoding (TokenModel)

    def default_order(self) -> BaseOrder:
        """Random, one token a call: any other is as good as its training mixture made it."""
        return make_order("random", self.grid)

    def check_order(self, order: BaseOrder) -> None:
        """Every order fits; raises VgenError for one that was made for another number of frames, rows or columns."""
        if order.grid != self.grid:
            made, own = ("x".join(map(str, grid)) for grid in (order.grid, self.grid))
            raise VgenError(f"this model decodes a grid of {own}, the order {order.name!r} was made for {made}")

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> AnyOrderState:
        """Runs the prefixes of all guidance rows, then the known part of the canvas as one step."""
        condition = _stack_conditions(conditions, self.device)
        rows, prefix = condition.mask.shape
        slots = prefix + grid_size(canvas.grid)
        layers = len(self.content) + 1
        cache = KVCache(layers, rows, self.config.heads, slots, self.head_dim, self.device, self.dtype)
        state = AnyOrderState(
            cache,
            condition.mask,
            condition.mask.sum(dim=1),
            grid_coordinates(canvas.grid, self.device),
            prefix,
            len(conditions),
            Counters(),
        )
        rope = self._rope(text_positions(prefix, self.device).expand(rows, -1, -1))
        causal = (
            torch.ones(prefix, prefix, dtype=torch.bool, device=self.device).tril() & condition.mask[:, None, None, :]
        )
        self._extend(state, self.prefix_embedding(condition.ids), rope, slice(0, prefix), causal)
        known = canvas.unknown_count() < grid_size(canvas.grid)
        canvas.fresh = canvas.known.nonzero()[:, 1].view(canvas.batch, -1) if known else None
        return state

    def plan(self, state: AnyOrderState, step: Step, canvas: Canvas) -> Plan:
        """Coordinates and slots of a call: what the previous step wrote enters, `step.targets` are asked for."""
        table = state.coordinates
        targets = step.targets.to(self.device)
        targets = (targets if targets.dim() == 2 else targets.expand(canvas.batch, -1)).repeat(state.rows, 1)
        fresh = None if canvas.fresh is None else canvas.fresh.repeat(state.rows, 1)
        fed = 0 if fresh is None else fresh.shape[1]
        return Plan(None if fresh is None else table[fresh], table[targets], slice(state.length, state.length + fed))

    def run(self, state: AnyOrderState, plan: Plan, values: Tensor | None) -> Tensor:
        """Feeds `values` [R * B, f] (None: nothing new) and answers the targets: logits [R * B, m, codes]. Device only."""
        visible = F.pad(state.prefix_mask, (0, plan.slots.stop - state.prefix_mask.shape[1]), value=True)[
            :, None, None, :
        ]
        if values is not None:
            rope = self._rope(visual_positions(plan.fed, state.offset))
            self._extend(state, self.code_embedding(values), rope, plan.slots, visible)
        key, value = state.cache.read(len(self.content), plan.slots.stop)
        rope = self._rope(visual_positions(plan.targets, state.offset))
        z = self._start_queries(plan.targets)
        for block in self.queries:
            z = block(z, rope, key, value, visible)
        return self.head(self.norm(z))

    def _extend(self, state: AnyOrderState, x: Tensor, rope: Tables, slots: slice, mask: Tensor) -> None:
        """Runs the content stack over new tokens [R * B, f, width] and stores their keys and values at `slots`."""
        for layer, block in enumerate(self.content):
            query, key, value = block.project(x, rope)
            x = block.finish(x, attend(query, *state.cache.extend(layer, slots, key, value), mask))
        state.cache.write(len(self.content), slots, *self._share(x, rope))

    @torch.no_grad()
    def predict(self, state: AnyOrderState, step: Step, canvas: Canvas) -> Logits:
        """One call: content pass over what the previous step wrote, query pass over this step's targets."""
        plan = self.plan(state, step, canvas)
        values = None if canvas.fresh is None else canvas.values.gather(1, canvas.fresh).repeat(state.rows, 1)
        logits = self.run(state, plan, values)
        state.length = plan.slots.stop
        fed = 0 if values is None else values.shape[1]
        state.counters.add(logits.shape[0], fed + step.size)
        return Logits(rearrange(logits, "(r b) m v -> r b m v", r=state.rows))


def _stack_conditions(conditions: Sequence[Condition], device: torch.device) -> Condition:
    """Guidance rows one after the other: ids and mask [R * B, P], right-padded to the longest prefix."""
    length = max(c.ids.shape[1] for c in conditions)
    ids = torch.cat([F.pad(c.ids, (0, length - c.ids.shape[1])) for c in conditions])
    mask = torch.cat([F.pad(c.mask, (0, length - c.mask.shape[1]), value=False) for c in conditions])
    return Condition(ids.to(device), mask.to(device))
