"""DAR: direction-aware diagonal autoregression (arXiv 2503.11129): one token a call along a zig-zag of diagonals.

Three things tell every token where the next one lies: 4D-RoPE turns queries and keys by the coordinates of the current
*and* of the predicted cell; the direction of the move between them is embedded, and its sum with the class embedding
modulates every norm, token by token; frozen codebook vectors of the tokenizer serve as token embeddings.

No code and no checkpoint of the authors could be had: docs/families/dar.md says which parts are the paper's and which are ours.
Only five conditions exist per class (one per direction), so their modulations are computed once and looked up.

Shapes: B batch, R guidance rows, T tokens of a picture, D width, K = 5 directions (4 moves and the start).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError, nearest
from vgen.layers.cache import KVCache, Memory
from vgen.layers.modulation import ModulatedBlock, Modulation, SelfAttention, modulate
from vgen.layers.rope2d import rope4d_table
from vgen.layers.transformer import Checkpointed, SwiGLU, llama_hidden
from vgen.models.base import Generator
from vgen.models.conditions.classes import ClassConditional, mean_vector, token_loss
from vgen.samplers.orders import make_order
from vgen.samplers.orders.base import BaseOrder, FixedOrder
from vgen.samplers.orders.diagonal import START, move_directions, scan_coordinates
from vgen.samplers.predictions import Logits
from vgen.samplers.types import Canvas, Condition, Counters, Step, grid_size

# name: (width, layers, heads). The paper gives names and totals (485 M to 2.0 B); the shapes are ours, chosen to fit them.
SIZES = {
    "B": (1024, 24, 16),  # 484 M
    "L": (1280, 36, 20),  # 1.1 B
    "XL": (1536, 48, 24),  # 2.1 B
}
EPS = 1e-6
DIRECTION_COUNT = START + 1
# Names of the spec that we follow -> names of our modules.
RENAMED = (
    (r"^(blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
    (r"^(blocks\.\d+)\.(w[123])\.", r"\1.mlp.\2."),
    (r"^(blocks\.\d+)\.ada\.", r"\1.adaLN_modulation.1."),
    (r"^final_ada\.", "final_ada.1."),
)


def size_config(size: str) -> dict[str, int]:
    """Constructor arguments of a named size (`SIZES`, in either case of letters)."""
    if size.upper() not in SIZES:
        raise VgenError(f"unknown DAR size {size!r}{nearest(size.upper(), SIZES)}; sizes: {', '.join(SIZES)}")
    return dict(zip(("width", "layers", "heads"), SIZES[size.upper()]))


@dataclass(frozen=True)
class Scan:
    """What an order says about each of the T inputs (the class, then tokens): where it is, what it predicts, how it gets there."""

    positions: Tensor  # [T] raster position that input t predicts
    directions: Tensor  # [T] direction of the move, `START` for the class
    current: Tensor  # [T, 2] row and column of the input, from 1; (0, 0) for the class
    target: Tensor  # [T, 2] row and column of what it predicts, from 1

    @classmethod
    def of(cls, order: FixedOrder, device: torch.device) -> Scan:
        """The scan of a zig-zag order on `device`."""
        width = order.grid[2]
        coordinates = scan_coordinates(order.positions, width)
        directions = move_directions(order.positions, width)
        return cls(*(part.to(device) for part in (order.positions, directions, *coordinates)))


@dataclass
class DARState:
    """Memory of one run: caches in decode order, and per row what stays the same for the whole run."""

    cache: KVCache
    classes: Tensor  # [R * B, D] class embeddings: the first input
    modulations: list[Tensor]  # one [R * B, K, 6D] per block
    final: Tensor  # [R * B, K, 2D]
    scan: Scan
    rope: Tensor  # [T, head size / 2, 2]
    strayed: Tensor  # [] bool: whether a step asked for another position than the zig-zag's next one
    length: int  # slots filled so far
    rows: int  # R
    counters: Counters


@dataclass(frozen=True)
class Plan:
    """One call: the slot that is filled, equal to the number of calls before it."""

    slot: int


class DARModel(ClassConditional, Checkpointed, Generator, ModelMixin, ConfigMixin):
    """Class-conditional generator over discrete tokens in zig-zag order (module docstring).

    codes x code_channels: the tokenizer's codebook (`load_codebook`); conditioning: class, or words (`ClassConditional`); classes: without the null class; grid: (H, W) or
    (1, H, W); width, layers, heads: as in SIZES; hidden: of the SwiGLU (None: Llama's rule); first: first move of the
    zig-zag, right or down; theta: base of the rope; dropout: of attention outputs and MLPs, attention_dropout: of attention weights; condition_dropout:
    share of null classes in training.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("ModulatedBlock",)
    _no_split_modules = ("ModulatedBlock",)
    size_config = staticmethod(size_config)

    @register_to_config
    def __init__(
        self,
        codes: int = 16384,
        code_channels: int = 256,
        conditioning: str = "class",
        classes: int = 1000,
        grid: Sequence[int] = (1, 16, 16),
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        hidden: int | None = None,
        first: str = "right",
        theta: float = 10000.0,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        condition_dropout: float = 0.1,
    ):
        super().__init__()
        if width % heads or (width // heads) % 8:
            raise VgenError(
                f"width {width} over {heads} heads must give a head size that is a multiple of 8 (4D-RoPE), got {width / heads:g}"
            )
        self.set_grids(grid)
        if self.grid[0] != 1:
            raise VgenError(f"DAR scans one picture, grid (1, H, W), got {self.grid}")
        self.set_vocabulary()
        hidden = hidden or llama_hidden(width)
        self.register_buffer("codebook", torch.zeros(codes, code_channels))  # frozen: the paper's token embeddings
        self.tok_proj = nn.Linear(code_channels, width)
        self.class_emb = nn.Embedding(classes + 1, width)
        self.dir_emb = nn.Embedding(DIRECTION_COUNT, width)
        self.blocks = nn.ModuleList(
            ModulatedBlock(
                SelfAttention(width, heads, bias=False),
                SwiGLU(width, hidden, dropout),
                affine=False,
                dropout=dropout,
                attention_dropout=attention_dropout,
                eps=EPS,
            )
            for _ in range(layers)
        )
        self.final_norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.final_ada = Modulation(width, 2)
        self.head = nn.Linear(width, codes, bias=False)
        self.gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        """N(0, 0.02) for matrices and tables, zeros for biases, modulations and the head: the first loss is ln(codes)."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.normal_(part.weight, std=0.02)
                if getattr(part, "bias", None) is not None:
                    nn.init.zeros_(part.bias)
        for part in self.modules():
            if isinstance(part, Modulation):
                part.reset_parameters()
        nn.init.zeros_(self.head.weight)
        nn.init.normal_(self.codebook, std=self.codebook.shape[1] ** -0.5)  # until a tokenizer's is loaded

    # ---------------------------------------------------------------- files

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any] = "B"
    ) -> DARModel:
        """A model from a file or state dict with the names of our spec (blocks.0.qkv.weight, …): none is published.

        config: a size of SIZES or constructor arguments. Raises VgenError for another file, family or size.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        for pattern, name in RENAMED:
            state = {re.sub(pattern, name, key): value for key, value in state.items()}
        with torch.device("meta"):
            model = cls(**(cls.size_config(config) if isinstance(config, str) else config))
        load_exactly(model, state)
        return model.eval()

    from_single_file = from_original

    @torch.no_grad()
    def load_codebook(self, codebook: Tensor) -> None:
        """Takes over the code vectors [codes, code_channels] of the tokenizer that the model is trained with."""
        if codebook.shape != self.codebook.shape:
            raise VgenError(
                f"this DAR model was made for a codebook of {list(self.codebook.shape)}, the tokenizer has {list(codebook.shape)}; "
                "set codes and code_channels to the tokenizer's"
            )
        self.codebook.copy_(codebook)

    # ---------------------------------------------------------------- conditions

    def class_rows(self, condition: Condition) -> Tensor:
        """The condition vectors [B, D] of a batch."""
        return mean_vector(self.class_emb(condition.ids.to(self.device)), condition.mask.to(self.device))

    # ---------------------------------------------------------------- shared by training and decoding

    def default_order(self) -> FixedOrder:
        """The order that the model is trained and sampled in."""
        return make_order("diagonal", self.grid, way="zigzag", first=self.config.first)

    def check_order(self, order: BaseOrder) -> None:
        """Raises VgenError for another order than the one the model is trained in: it has no embedding for other moves."""
        own = self.default_order()
        positions, sizes = order.sequence()
        if max(sizes) > 1 or not torch.equal(positions, own.positions):
            raise VgenError(
                f"DAR decodes along its own zig-zag, one token a call; use {own.name!r} instead of {order.name!r}"
            )

    def _rope(self, scan: Scan) -> Tensor:
        return rope4d_table(scan.current, scan.target, self.config.width // self.config.heads, self.config.theta)

    def _directed(self, classes: Tensor) -> Tensor:
        """Conditions of every direction [B, K, D] for class embeddings [B, D]; `Modulation` applies the SiLU."""
        return classes[:, None] + self.dir_emb.weight

    def _embed(self, tokens: Tensor) -> Tensor:
        """[B, n] int64 -> [B, n, D]."""
        return self.tok_proj(self.codebook[tokens])

    def _predict_head(self, x: Tensor, final: Tensor) -> Tensor:
        """[B, n, D], final modulation [B, n, 2D] -> logits [B, n, codes]."""
        shift, scale = final.chunk(2, dim=-1)
        return self.head(modulate(self.final_norm(x), shift, scale))

    # ---------------------------------------------------------------- training

    def forward(self, condition: Condition, tokens: Tensor) -> Tensor:
        """Teacher-forced logits [B, T, codes] in scan order. tokens: [B, T] int64 in raster order."""
        scan = Scan.of(self.default_order(), tokens.device)
        classes = self.class_rows(condition)
        sequence = tokens[:, scan.positions]
        x = torch.cat((classes[:, None], self._embed(sequence[:, :-1])), dim=1)
        conditions, rope = self._directed(classes), self._rope(scan)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        for block in self.blocks:
            x = self._checkpointed(self._layer, block, x, conditions, scan.directions, mask, rope)
        return self._predict_head(x, self.final_ada(conditions)[:, scan.directions])

    @staticmethod
    def _layer(
        block: ModulatedBlock, x: Tensor, conditions: Tensor, directions: Tensor, mask: Tensor, rope: Tensor
    ) -> Tensor:
        return block(x, block.adaLN_modulation(conditions)[:, directions], mask, rope)

    def loss(self, condition: Condition, tokens: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy in nats per token, fp32, and accuracy. tokens: [B, T] in raster order.

        The recipe drops a share of the classes first (`drop`).
        """
        sequence = tokens[:, self.default_order().positions.to(tokens.device)]
        logits = self(condition, tokens)
        return token_loss(logits, sequence)

    # ---------------------------------------------------------------- decoding (TokenModel)

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> DARState:
        """An empty cache, and the modulations of all directions for every row."""
        if canvas.values.shape[1] != grid_size(self.grid) or canvas.unknown_count() != grid_size(self.grid):
            raise VgenError(
                f"DAR decodes an empty canvas of {grid_size(self.grid)} tokens from its first corner on, this one has "
                f"{canvas.values.shape[1]} with {canvas.unknown_count()} unknown; use the native model for inpainting"
            )
        for condition in conditions:
            self.check_condition(condition)
        classes = torch.cat([self.class_rows(condition) for condition in conditions])
        config, directed = self.config, self._directed(classes)
        slots, size = grid_size(self.grid), config.width // config.heads
        cache = KVCache(config.layers, len(classes), config.heads, slots, size, self.device, self.dtype)
        scan = Scan.of(self.default_order(), self.device)
        return DARState(
            cache=cache,
            classes=classes,
            modulations=[block.adaLN_modulation(directed) for block in self.blocks],
            final=self.final_ada(directed),
            scan=scan,
            rope=self._rope(scan),
            strayed=torch.zeros((), dtype=torch.bool, device=self.device),
            length=0,
            rows=len(conditions),
            counters=Counters(),
        )

    def plan(self, state: DARState, step: Step, canvas: Canvas) -> Plan:
        """The class enters in the first call, then what the last step wrote; the slot is the number of the call."""
        if step.size != 1:
            raise VgenError(f"DAR decodes one token a call, the order asks for {step.size}; use diagonal")
        state.strayed |= (step.targets.to(self.device) != state.scan.positions[state.length]).any()
        return Plan(state.length)

    def run(self, state: DARState, plan: Plan, values: Tensor | None) -> Tensor:
        """values [R * B, 1] (None: the class) -> logits [R * B, 1, codes]. Device only."""
        slots = slice(plan.slot, plan.slot + 1)
        x = state.classes[:, None] if values is None else self._embed(values)
        direction = state.scan.directions[slots]
        for layer, (block, modulation) in enumerate(zip(self.blocks, state.modulations)):
            chosen = modulation.index_select(1, direction)
            x = block(x, chosen, None, state.rope[slots], Memory(state.cache, layer, slots))
        return self._predict_head(x, state.final.index_select(1, direction))

    @torch.no_grad()
    def predict(self, state: DARState, step: Step, canvas: Canvas) -> Logits:
        """One call of R * B rows of one token."""
        plan = self.plan(state, step, canvas)
        values = None if plan.slot == 0 else canvas.values.gather(1, canvas.fresh).repeat(state.rows, 1)
        logits = self.run(state, plan, values)
        state.length = plan.slot + 1
        state.counters.add(logits.shape[0], 1)
        return Logits(rearrange(logits, "(r b) m v -> r b m v", r=state.rows))

    def commit(self, state: DARState, step: Step, canvas: Canvas) -> None:
        """After the last call: raises VgenError if the order was not the model's own (one synchronisation a picture).

        Callers that look before they run use `check_order`.
        """
        if step.unknown[1] == 0 and bool(state.strayed):
            raise VgenError(f"DAR decodes along its own zig-zag; use the order {self.default_order().name!r}")
