"""RAR: a causal transformer trained on random orders that anneal to raster (arXiv 2411.00776), over MaskGIT-VQGAN tokens.

The sequence is [cls, class, tokens in decode order]. Besides its own position every slot from the class on carries the
position of the token that it must predict (target-aware position embedding, section 3.3), so one model reads any order;
every slot's adaLN condition is the class plus the slot's index. Output of slot j + 1 predicts token j.

Published weights end their training in raster order: other orders are possible, and worse. Parameter names are those of
the released files.

Shapes: B batch, R guidance rows, L tokens of a picture, n <= L tokens so far, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError, nearest
from vgen.layers.cache import KVCache, Memory, remember
from vgen.layers.modulation import FinalNorm, ModulatedBlock, Modulation, SelfAttention
from vgen.layers.transformer import Checkpointed, GeluMLP
from vgen.models.base import Generator
from vgen.models.conditions.classes import ClassConditional, mean_vector, token_loss
from vgen.samplers.orders import make_order
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.predictions import Logits
from vgen.samplers.types import Canvas, Condition, Counters, Step, grid_size

# name: (width, layers, heads, hidden). Paper, table 1, and the released files.
SIZES = {
    "B": (768, 24, 16, 3072),  # 261 M
    "L": (1024, 24, 16, 4096),  # 462 M
    "XL": (1280, 32, 16, 5120),  # 955 M
    "XXL": (1408, 40, 16, 6144),  # 1499 M
}
EPS = 1e-6
# Rows of the tables beyond the L tokens. Only the first two (cls and class) are used; released files have them all.
SPARE_POSITIONS, SPARE_STEPS = 1024, 100
PREFIX = 2  # cls and class


def size_config(size: str) -> dict[str, int]:
    """Constructor arguments of a named size (`SIZES`, in either case of letters)."""
    if size.upper() not in SIZES:
        raise VgenError(f"unknown RAR size {size!r}{nearest(size.upper(), SIZES)}; sizes: {', '.join(SIZES)}")
    return dict(zip(("width", "layers", "heads", "hidden"), SIZES[size.upper()]))


def random_share(progress: float, start: float = 0.5, end: float = 0.75) -> float:
    """Share of the training samples that get a random order; the others get raster (section 3.2).

    progress: share of the training that is done, 0 to 1. 1 until `start`, then linear to 0 at `end` (the paper's best:
    epochs 200 and 300 of 400).
    """
    if not 0 <= start <= end <= 1:
        raise VgenError(f"the annealing must start and end within 0..1 in this order, got {start} and {end}")
    return float(progress < start) if start == end else min(1.0, max(0.0, (end - progress) / (end - start)))


def draw_orders(batch: int, length: int, share: float, generator: torch.Generator | None = None) -> Tensor:
    """[B, L] int64 positions in decode order: a uniform permutation with probability `share`, else raster."""
    permutations = torch.rand(batch, length, generator=generator).argsort(dim=1)
    random = torch.rand(batch, 1, generator=generator) < share
    return torch.where(random, permutations, torch.arange(length))


@dataclass
class RARState:
    """Memory of one run. The cache has a slot for cls, class and every token but the last one drawn, in decode order."""

    cache: KVCache
    classes: Tensor  # [R * B, D] embedding rows of the classes, without positions
    length: int  # slots filled so far
    rows: int  # R
    counters: Counters


@dataclass(frozen=True)
class Plan:
    """One call: the positions that enter [R * B, f] (after cls and class in the first call), what each of the fed slots
    predicts [R * B, f (+ 1)], and the slots."""

    fed: Tensor
    targets: Tensor
    slots: slice

    @property
    def first(self) -> bool:
        """Whether cls and class enter in this call."""
        return self.slots.start == 0


class RARModel(ClassConditional, Checkpointed, Generator, ModelMixin, ConfigMixin):
    """Class-conditional generator over discrete tokens (module docstring).

    codes: visual vocabulary; conditioning: class, or words (`ClassConditional`); classes: class labels, the null class not counted; grid: (T, H, W) or (H, W); width, layers,
    heads, hidden: as in SIZES; dropout: of attention outputs and MLPs, attention_dropout: of attention weights; condition_dropout: share of null classes in training.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("ModulatedBlock",)
    _no_split_modules = ("ModulatedBlock",)
    size_config = staticmethod(size_config)

    @register_to_config
    def __init__(
        self,
        codes: int = 1024,
        conditioning: str = "class",
        classes: int = 1000,
        grid: Sequence[int] = (1, 16, 16),
        width: int = 768,
        layers: int = 24,
        heads: int = 16,
        hidden: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        condition_dropout: float = 0.1,
    ):
        super().__init__()
        if width % heads:
            raise VgenError(f"width {width} must be a multiple of the {heads} heads")
        self.set_grids(grid)
        self.set_vocabulary()
        length = grid_size(self.grid)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, length + SPARE_POSITIONS, width))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, length + SPARE_POSITIONS, width))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, length + SPARE_STEPS, width))
        # Rows: codes, one unused (a mask token in the MaskGIT of the same authors), classes, the null class.
        self.embeddings = nn.Embedding(codes + 1 + classes + 1, width)
        self.blocks = nn.ModuleList(
            ModulatedBlock(
                SelfAttention(width, heads, bias=True, norm_eps=EPS),
                GeluMLP(width, hidden, dropout),
                affine=True,
                dropout=dropout,
                attention_dropout=attention_dropout,
                eps=EPS,
            )
            for _ in range(layers)
        )
        self.adaln_before_head = FinalNorm(width)
        self.lm_head = nn.Linear(width, codes)
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        """Truncated normal 0.02 for matrices and tables, zeros for cls, biases and modulations (released code)."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if getattr(part, "bias", None) is not None:
                    nn.init.zeros_(part.bias)
        for part in self.modules():
            if isinstance(part, Modulation):
                part.reset_parameters()
        for table in (self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(table, std=0.02)

    # ---------------------------------------------------------------- files

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "B"
    ) -> RARModel:
        """A model from a released file (flat state dict, no EMA) or its state dict.

        config: a size of SIZES or constructor arguments. Raises VgenError for another file, family or size.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        with torch.device("meta"):
            model = cls(**(cls.size_config(config) if isinstance(config, str) else config))
        load_exactly(model, state)
        return model.eval()

    from_single_file = from_original

    # ---------------------------------------------------------------- conditions

    def class_rows(self, condition: Condition) -> Tensor:
        """The condition vectors [B, D] of a batch."""
        rows = self.embeddings(condition.ids.to(self.device) + self.config.codes + 1)
        return mean_vector(rows, condition.mask.to(self.device))

    # ---------------------------------------------------------------- shared by training and decoding

    def _prefix(self, classes: Tensor, target: Tensor) -> Tensor:
        """Inputs of cls and class: [B, 2, D]. classes [B, D], target [B]: the position that the class slot predicts."""
        cls = (self.cls_token[:, 0] + self.pos_embed[:, 0]).expand_as(classes)
        label = classes + self.pos_embed[:, 1] + self.target_aware_pos_embed[0, PREFIX + target]
        return torch.stack((cls, label), dim=1)

    def _tokens(self, values: Tensor, own: Tensor, target: Tensor) -> Tensor:
        """Inputs of tokens: [B, n, D]. values, own positions [B, n]; target [B, n or n - 1]: the last one of all has none."""
        x = self.embeddings(values) + self.pos_embed[0, PREFIX + own]
        hints = self.target_aware_pos_embed[0, PREFIX + target]
        return x + F.pad(hints, (0, 0, 0, x.shape[1] - hints.shape[1]))

    def _run(self, x: Tensor, classes: Tensor, slots: slice, cache: KVCache | None = None) -> Tensor:
        """Blocks and head over the given slots: [B, f, D] -> [B, f, codes]. Causal over the slots."""
        condition = classes[:, None] + self.timesteps_embeddings[:, slots]  # [B, f, D]: it differs along the sequence
        size = slots.stop - slots.start
        mask = None  # a single new slot sees everything
        if size > 1:
            mask = torch.ones(size, slots.stop, dtype=torch.bool, device=x.device).tril(slots.start)
        for layer, block in enumerate(self.blocks):
            memory = remember(cache, layer, slots)
            x = self._checkpointed(self._layer, block, x, condition, mask, memory)
        return self.lm_head(self.adaln_before_head(x, condition))

    @staticmethod
    def _layer(
        block: ModulatedBlock, x: Tensor, condition: Tensor, mask: Tensor | None, memory: Memory | None
    ) -> Tensor:
        return block(x, block.adaLN_modulation(condition), mask, memory=memory)

    # ---------------------------------------------------------------- training

    def forward(self, condition: Condition, sequence: Tensor, orders: Tensor | None = None) -> Tensor:
        """Teacher-forced logits [B, n + 1, codes]: entry k predicts the k-th token in decode order.

        sequence: [B, n] int64 tokens *in decode order*, n <= L; with n = L the last entry predicts nothing. orders:
        [B, L] the positions in decode order (None: raster). The loss uses the first L entries.
        """
        batch, tokens = sequence.shape
        length = grid_size(self.grid)
        if orders is None:
            orders = torch.arange(length, device=sequence.device).expand(batch, -1)
        classes = self.class_rows(condition)
        following = orders[:, 1 : tokens + 1]
        x = torch.cat(
            (self._prefix(classes, orders[:, 0]), self._tokens(sequence, orders[:, :tokens], following)), dim=1
        )
        return self._run(x, classes, slice(0, PREFIX + tokens))[:, 1:]

    def loss(self, condition: Condition, tokens: Tensor, orders: Tensor | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy in nats per token, fp32, and accuracy. tokens: [B, L] in raster order; orders as `forward`.

        The recipe drops a share of the classes first (`drop`) and draws orders by `draw_orders(…, random_share(progress))`.
        """
        sequence = tokens if orders is None else tokens.gather(1, orders)
        logits = self(condition, sequence, orders)[:, :-1]
        return token_loss(logits, sequence)

    # ---------------------------------------------------------------- decoding (TokenModel)

    def default_order(self) -> BaseOrder:
        """Raster, in which the published weights end their training."""
        return make_order("raster", self.grid)

    def check_order(self, order: BaseOrder) -> None:
        """Raises VgenError for an order that decodes more than one token a call."""
        if order.calls != grid_size(order.grid):
            raise VgenError(
                f"RAR decodes one token a call, order {order.name!r} makes {order.calls} calls for {grid_size(order.grid)} "
                "tokens; use raster, diagonal, or random with as many steps as tokens"
            )

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> RARState:
        """An empty cache; known tokens enter with the first call, in raster order."""
        length = grid_size(self.grid)
        if canvas.values.shape[1] != length:
            raise VgenError(f"this RAR model makes {length} tokens a picture, the canvas has {canvas.values.shape[1]}")
        for condition in conditions:
            self.check_condition(condition)
        classes = torch.cat([self.class_rows(condition) for condition in conditions])
        config = self.config
        cache = KVCache(
            config.layers, len(classes), config.heads, PREFIX + length - 1, config.width // config.heads, self.device, self.dtype
        )  # fmt: skip
        known = length - canvas.unknown_count()
        canvas.fresh = canvas.known.nonzero()[:, 1].view(canvas.batch, known)
        return RARState(cache, classes, 0, len(conditions), Counters())

    def plan(self, state: RARState, step: Step, canvas: Canvas) -> Plan:
        """What the last step wrote enters and predicts `step.targets`, one token a call."""
        if step.size != 1:
            raise VgenError(f"RAR decodes one token a call, the order asks for {step.size}; use raster or diagonal")
        target = step.targets.to(self.device).expand(canvas.batch, 1).repeat(state.rows, 1)
        fed = canvas.fresh.repeat(state.rows, 1)
        targets = torch.cat((fed, target) if state.length == 0 else (fed[:, 1:], target), dim=1)
        start = state.length
        return Plan(fed, targets, slice(start, start + fed.shape[1] + (PREFIX if start == 0 else 0)))

    def run(self, state: RARState, plan: Plan, values: Tensor) -> Tensor:
        """values [R * B, f] -> logits [R * B, 1, codes] of the last slot. Device only."""
        if plan.first:
            inputs = self._tokens(values, plan.fed, plan.targets[:, 1:])
            inputs = torch.cat((self._prefix(state.classes, plan.targets[:, 0]), inputs), dim=1)
        else:
            inputs = self._tokens(values, plan.fed, plan.targets)
        return self._run(inputs, state.classes, plan.slots, state.cache)[:, -1:]

    @torch.no_grad()
    def predict(self, state: RARState, step: Step, canvas: Canvas) -> Logits:
        """One call: R * B rows of one token (two more, and the known tokens, in the first call)."""
        plan = self.plan(state, step, canvas)
        logits = self.run(state, plan, canvas.values.gather(1, canvas.fresh).repeat(state.rows, 1))
        state.length = plan.slots.stop
        state.counters.add(logits.shape[0], plan.slots.stop - plan.slots.start)
        return Logits(rearrange(logits, "(r b) m v -> r b m v", r=state.rows))
