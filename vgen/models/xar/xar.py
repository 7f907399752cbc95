"""xAR: next-X prediction with flow matching inside the backbone, and noisy context learning (arXiv 2502.20388).

A picture is a row of entities: groups of continuous tokens, such as cells of 8 x 8. A transformer that is bidirectional within an
entity and causal over entities turns noisy tokens into their velocity. In training, all entities are noisy, each at a time
of its own, and entity k sees the noisy ones before it. In sampling it sees finished ones, fed as time 0: these enter together with the first
substep of the next entity and are kept as keys and values; the other substeps run over the current entity alone.

What may be an entity says xar_entities.py. Parameter names are those of the released files.

Shapes: B batch, R guidance rows, N tokens of C channels, K entities, f fed tokens, m tokens of the current entity, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError, nearest
from vgen.layers.cache import KVCache, Memory, remember
from vgen.layers.diffusion_head import TimeEmbedding
from vgen.layers.modulation import Modulation, SelfAttention, modulate
from vgen.layers.norm import RMSNorm
from vgen.layers.transformer import Checkpointed, GeGLU
from vgen.models.base import Generator
from vgen.models.conditions.classes import ClassConditional, mean_vector
from vgen.models.xar.entities import Layout, entity_grids, entity_order, with_scales
from vgen.samplers.choice import FlowChoice
from vgen.samplers.flow import logit_normal_times, noisy
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.orders.levels import LevelsOrder
from vgen.samplers.predictions import Flow
from vgen.samplers.types import Canvas, Condition, Counters, Grid, Step, as_grid, grid_size

# name: (width, blocks of each of the two stacks, heads). Released files; the paper's table calls H "1.1B".
SIZES = {
    "B": (768, 8, 12),  # 173 M
    "L": (1024, 16, 16),  # 608 M
    "H": (1280, 20, 16),  # 1186 M
}
EPS = 1e-6
TIME_STEPS = 1000
TABLES = (".attn.rope.", "mask")  # buffers of the released files: computed here


def size_config(size: str) -> dict[str, int]:
    """Constructor arguments of a named size (`SIZES`, in either case of letters)."""
    if size.upper() not in SIZES:
        raise VgenError(f"unknown xAR size {size!r}{nearest(size.upper(), SIZES)}; sizes: {', '.join(SIZES)}")
    width, depth, heads = SIZES[size.upper()]
    return {"width": width, "encoder_depth": depth, "decoder_depth": depth, "heads": heads}


def time_index(times: Tensor) -> Tensor:
    """Times in [0, 1] -> the integers 0 … 1000 that are embedded: a product in fp32, cut off (not rounded), as released."""
    return (TIME_STEPS * times.float()).long()


@dataclass
class XARState:
    """Memory of one run. The cache holds `cached` entities as they were finished; what lies behind them is overwritten."""

    cache: KVCache
    classes: Tensor  # [R * B, D]
    layout: Layout
    finished: int  # entities that are on the canvas
    cached: int
    rows: int  # R
    counters: Counters


@dataclass(frozen=True)
class Plan:
    """One call: the slots that enter, those of the entity at hand among them (the last ones), and how many entities these are."""

    slots: slice
    current: slice
    entities: int


class XARModel(ClassConditional, Checkpointed, Generator, ModelMixin, ConfigMixin):
    """Generator of continuous tokens, entity by entity (module docstring).

    channels: C of a token, scaled as its tokenizer gives it; grid: (H, W) or (1, H, W); entities: see `entity_order`; width,
    encoder_depth, decoder_depth (two stacks of the same block, one behind the other), heads: as in SIZES; conditioning, classes: see
    `ClassConditional`; condition_dropout: share of samples without condition in training; dropout: of attention outputs and MLPs;
    attention_dropout: of attention weights.
    """

    choice_kind: ClassVar[type] = FlowChoice
    least_guidance: ClassVar[float] = 1.0
    _supports_gradient_checkpointing = True
    _repeated_blocks = ("EntityBlock",)
    _no_split_modules = ("EntityBlock",)
    size_config = staticmethod(size_config)

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        grid: Sequence[int] = (1, 16, 16),
        entities: str = "blocks-8",
        width: int = 768,
        encoder_depth: int = 8,
        decoder_depth: int = 8,
        heads: int = 12,
        conditioning: str = "class",
        classes: int = 1000,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
    ):
        super().__init__()
        if width % heads or width // heads % 4:
            raise VgenError(
                f"width {width} over {heads} heads must give a head size that is a multiple of 4, got {width / heads:g}"
            )
        whole = as_grid(grid)
        if whole[0] != 1:
            raise VgenError(f"xAR makes pictures: the grid must be HxW, got {whole}")
        with torch.device("cpu"):  # host tables, also while the parameters are made on the meta device
            self.set_grids(*entity_grids(entities, whole))  # more than one for scales only
            self.order = entity_order(entities, whole)
        self.set_vocabulary()
        length, hidden = sum(map(grid_size, self.grids)), int(8 * width / 3)

        def stack(depth: int) -> nn.ModuleList:
            return nn.ModuleList(EntityBlock(width, heads, hidden, dropout, attention_dropout) for _ in range(depth))

        self.class_emb = nn.Embedding(classes + 1, width)  # the last row is the null class
        self.time_embed = TimeEmbedding(width)
        self.z_proj = nn.Linear(channels, width)
        self.z_proj_ln = RMSNorm(width, EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, width))  # by slot
        self.encoder_blocks = stack(encoder_depth)
        self.encoder_norm = RMSNorm(width, EPS)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, width))  # by slot
        self.decoder_blocks = stack(decoder_depth)
        self.decoder_norm = RMSNorm(width, EPS)
        self.pred = nn.Linear(width, channels)
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier for every linear layer, the modulations too: gates do not start closed. N(0, 0.02) for tables, zero biases.

        Words are ours. They start as large as the embedded time to which they are added: from 0.02, captions are learnt much later than times.
        """
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        nn.init.normal_(self.class_emb.weight, std=0.02 if self.config.conditioning == "class" else 1.0)
        for table in (self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
            nn.init.normal_(table, std=0.02)

    # ---------------------------------------------------------------- files

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "B"
    ) -> XARModel:
        """A model from a released file (flat state dict) or its state dict.

        config: a size of SIZES or constructor arguments. Raises VgenError for another file, family or size, and for tables in the file
        that belong to other entities.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        with torch.device("meta"):
            model = cls(**(cls.size_config(config) if isinstance(config, str) else config))
        parameters = {key: value for key, value in state.items() if not any(name in key for name in TABLES)}
        load_exactly(model, parameters)
        model._check_tables(state)
        return model.eval()

    from_single_file = from_original

    def _check_tables(self, state: Mapping[str, Tensor]) -> None:
        """The mask and the first block's rotary tables show the entities that a file was trained with; files may lack them."""
        layout = Layout.of(self.order, self.grids, self.head_dim, "cpu")
        cos, sin = layout.rope.repeat_interleave(2, dim=1).unbind(dim=-1)
        expected = {
            "mask": torch.where(layout.visible, 0.0, -torch.inf)[None, None],
            "encoder_blocks.0.attn.rope.freqs_cos": cos,
            "encoder_blocks.0.attn.rope.freqs_sin": sin,
        }
        for key, table in expected.items():
            found = state.get(key)
            if found is not None and (
                found.shape != table.shape or not torch.allclose(found.float(), table, atol=1e-3)
            ):
                raise VgenError(
                    f"{key} of this file belongs to other entities than {self.config.entities!r} on a {self.grid[1]}x{self.grid[2]} "
                    "grid; name those it was trained with (config `entities`)"
                )

    # ---------------------------------------------------------------- the network

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.config.width // self.config.heads

    def layout(self) -> Layout:
        """The tables of the model's entities, on its device."""
        return Layout.of(self.order, self.grids, self.head_dim, self.device)

    def class_rows(self, condition: Condition) -> Tensor:
        """The condition vectors [B, D] of a batch."""
        return mean_vector(self.class_emb(condition.ids.to(self.device)), condition.mask.to(self.device))

    def conditions(self, classes: Tensor, times: Tensor) -> Tensor:
        """What modulates every entity: classes [B, D], times [B or 1, K] int64 (`time_index`) -> [B, K, D]."""
        return classes[:, None] + self.time_embed(times.flatten()).unflatten(0, times.shape)

    def run(self, x: Tensor, conditions: Tensor, layout: Layout, slots: slice, cache: KVCache | None = None) -> Tensor:
        """Tokens x [B, f, C] at `slots` of the sequence, conditions [B, k, D] of their k entities -> velocities [B, f, C]. Device only.

        cache: holds what lies before the slots, and takes them in; None: nothing lies before them.
        """
        entity = layout.entity[slots] - layout.entity[slots.start]
        rope = layout.rope[slots]
        # A single entity sees all there is.
        visible = layout.visible[slots, : slots.stop] if conditions.shape[1] > 1 else None

        def stack(blocks: nn.ModuleList, x: Tensor, first: int) -> Tensor:
            for layer, block in enumerate(blocks, first):
                memory = remember(cache, layer, slots)
                x = self._checkpointed(block, x, conditions, entity, rope, visible, memory)
            return x

        x = self.z_proj_ln(self.z_proj(x) + self.encoder_pos_embed_learned[:, slots])
        x = self.encoder_norm(stack(self.encoder_blocks, x, 0))
        x = self.decoder_embed(x) + self.decoder_pos_embed_learned[:, slots]
        x = self.decoder_norm(stack(self.decoder_blocks, x, len(self.encoder_blocks)))
        return self.pred(x)

    # ---------------------------------------------------------------- training

    def forward(self, condition: Condition, tokens: Tensor, times: Tensor) -> Tensor:
        """Velocities [B, N, C] of noisy tokens [B, N, C], both by canvas position; times [B, K] in [0, 1], one per entity."""
        layout = self.layout()
        conditions = self.conditions(self.class_rows(condition), time_index(times))
        x = tokens[:, layout.positions].to(self.dtype)
        return self.run(x, conditions, layout, slice(0, x.shape[1]))[:, layout.slots]

    def loss(
        self, condition: Condition, tokens: Tensor, normal: Tensor | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Noisy context learning: mean squared error of the velocity, noise - data, over all tokens. tokens [B, H W, C] in raster order.

        normal: N(0, 1) draws [B, K] whose sigmoids are the times of the entities; noise: N(0, 1) [B, N, C] by canvas position. What
        is None is drawn from torch's global generator. The recipe drops a share of the conditions first (`drop`).
        """
        tokens = with_scales(tokens, self.grids)
        if normal is None:
            normal = torch.randn(len(tokens), self.order.calls, device=tokens.device)
        noise = torch.randn_like(tokens) if noise is None else noise
        times = logit_normal_times(normal)
        entity = self.order.step_ids().to(tokens.device)  # of every position
        velocity = self(condition, noisy(tokens, noise, times[:, entity]), times)
        return {"loss": (velocity.float() - (noise - tokens)).square().mean()}

    # ---------------------------------------------------------------- decoding (TokenModel)

    @staticmethod
    def guidance(scale: float) -> ClassifierFree:
        """From 1 (the first entity is not guided) in equal steps to `scale` (the last one). Raises VgenError below 1."""
        if scale < 1:
            raise VgenError(f"the guidance scale of xAR must be at least 1 (1: no guidance), got {scale}")
        return ClassifierFree(scale, "step-linear-ends")

    def default_order(self) -> BaseOrder:
        """The order of the entities it was trained with, the only one. Scales: that of the finest, see `over_levels`."""
        return self.order.inner[-1] if isinstance(self.order, LevelsOrder) else self.order

    def over_levels(self, order: BaseOrder, low_steps: int | None = None, seed: int = 0) -> BaseOrder:
        """Scales: `order` of the finest one, with the others before it. Raises VgenError for `low_steps`: a scale is one call."""
        if len(self.grids) == 1:
            return order
        if low_steps is not None:
            raise VgenError("xAR makes every scale in one call; leave out low_steps")
        return LevelsOrder((*self.order.inner[:-1], order))

    def check_order(self, order: BaseOrder) -> None:
        """Raises VgenError for every other order."""
        if order.calls != self.order.calls or not all(map(torch.equal, order.groups(), self.order.groups())):
            raise VgenError(f"this xAR model decodes in the order {self.order.name}, got {order.name!r}")

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> XARState:
        """An empty cache. Known tokens must fill whole entities from the first one on: they enter with the first call."""
        if canvas.levels != self.grids or canvas.values.shape[2:] != (self.config.channels,):
            raise VgenError(
                f"this xAR model fills a canvas of {_shapes(self.grids)} tokens of {self.config.channels} channels, "
                f"got {_shapes(canvas.levels)} and values {list(canvas.values.shape)}"
            )
        layout, length = self.layout(), canvas.values.shape[1]
        for condition in conditions:
            self.check_condition(condition)
            if len(condition.mask) != canvas.batch:
                raise VgenError(
                    f"every guidance row needs one condition a picture: {canvas.batch}, got {len(condition.mask)}"
                )
        finished = self._known_entities(canvas, layout)
        classes = torch.cat([self.class_rows(condition) for condition in conditions])
        layers, heads = len(self.encoder_blocks) + len(self.decoder_blocks), self.config.heads
        cache = KVCache(layers, len(classes), heads, length, self.head_dim, self.device, self.dtype)
        return XARState(cache, classes, layout, finished, 0, len(conditions), Counters())

    def _known_entities(self, canvas: Canvas, layout: Layout) -> int:
        """How many entities are known already. Synchronises: once a run."""
        known = canvas.known.shape[1] - canvas.unknown_count()
        if known not in layout.ends or not canvas.known[:, layout.positions[:known]].all():
            raise VgenError(
                f"xAR continues pictures: known tokens must fill whole entities ({self.order.name}) from the first one on; "
                "for other masks use MAR or the native model"
            )
        return layout.ends.index(known)

    def plan(self, state: XARState, entity: int) -> Plan:
        """The slots of the entity, and of what is finished but not in the cache."""
        ends, first = state.layout.ends, state.cached
        slots, current = slice(ends[first], ends[entity + 1]), slice(ends[entity], ends[entity + 1])
        return Plan(slots, current, entity + 1 - first)

    @torch.no_grad()
    def velocity(self, state: XARState, canvas: Canvas, entity: int, x: Tensor, t: float) -> Tensor:
        """One call: tokens x [B, m, C] of an entity at time t -> velocities [R, B, m, C] fp32.

        The first call of an entity also feeds the finished one before it, as time 0, whose keys and values then stay.
        """
        plan = self.plan(state, entity)
        context = canvas.values[:, state.layout.positions[plan.slots.start : plan.current.start]]
        fed = torch.cat((context, x), dim=1).to(self.dtype).repeat(state.rows, 1, 1)
        times = torch.zeros(1, plan.entities, dtype=torch.long, device=self.device)
        times[:, -1] = int(time_index(torch.tensor(t)))
        velocities = self.run(fed, self.conditions(state.classes, times), state.layout, plan.slots, state.cache)
        state.cached = entity
        state.counters.add(*fed.shape[:2])
        return rearrange(velocities[:, -x.shape[1] :].float(), "(r b) m c -> r b m c", r=state.rows)

    def predict(self, state: XARState, step: Step, canvas: Canvas) -> Flow:
        """The flow of the next entity. The network runs when it is drawn: once a substep, over R * B rows."""
        entity, ends = state.finished, state.layout.ends
        if step.size != ends[entity + 1] - ends[entity]:
            raise VgenError(
                f"this xAR model decodes in the order {self.order.name}, the order at hand asks for {step.size} tokens in call {step.index}"
            )
        velocity = partial(self.velocity, state, canvas, entity)
        return Flow(velocity, canvas.batch, self.config.channels, self.device)

    def commit(self, state: XARState, step: Step, canvas: Canvas) -> None:
        """One more entity is finished. The first call of the next one feeds it."""
        state.finished += 1


class EntityBlock(nn.Module):
    """x += gate · attention(modulate(norm x)), then the same with the MLP; RMS norms without weights, modulated per entity."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, attention_dropout: float):
        super().__init__()
        self.attention_dropout = attention_dropout
        self.norm = nn.RMSNorm(width, EPS, elementwise_affine=False)
        self.attn = SelfAttention(width, heads, bias=True)
        self.mlp = GeGLU(width, hidden, dropout)
        self.ada_lin = Modulation(width, 6)  # not adaLN-zero: see `XARModel._init_weights`
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, conditions: Tensor, entity: Tensor, rope: Tensor, visible: Tensor | None, memory: Memory | None
    ) -> Tensor:
        """x [B, f, D], conditions [B, k, D], entity [f]: which of the k a token belongs to -> [B, f, D].

        rope [f, D/2, 2]; visible and memory as in `SelfAttention`.
        """
        modulation = self.ada_lin(conditions)
        if modulation.shape[1] > 1:
            modulation = modulation[:, entity]
        # In this order, both gates first.
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, dim=-1)
        dropout = self.attention_dropout if self.training else 0.0
        attended = self.attn(modulate(self.norm(x), shift1, scale1), visible, rope, memory, dropout)
        x = x + gate1 * self.dropout(attended)
        return x + gate2 * self.mlp(modulate(self.norm(x), shift2, scale2))


def _shapes(grids: Sequence[Grid]) -> str:
    return " then ".join(f"{height}x{width}" for _, height, width in grids)
