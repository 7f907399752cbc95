"""What LlamaGen, PAR and NAR share: embeddings, blocks, rope table, cache, files (arXiv 2406.06525).

A family derives from `LlamaBackbone` and says how tokens are arranged: its `forward`, and its `plan` of a decoding call.
Parameter names are those of the published files.

Shapes: B batch, R guidance rows, T condition tokens, N positions, f fed tokens, m targets, D head size, V codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError, nearest
from vgen.layers.attention import Mask
from vgen.layers.cache import KVCache, Memory
from vgen.layers.llama import LlamaBlock
from vgen.layers.norm import RMSNorm
from vgen.layers.rope2d import rope2d_table, take_rows
from vgen.layers.transformer import Checkpointed, llama_hidden
from vgen.models.base import Generator
from vgen.models.conditions.classes import ClassConditional
from vgen.models.conditions.t5 import ClassEmbedding, T5Captions, TextEmbedding
from vgen.samplers.types import Canvas, Condition, Counters, Grid, grid_size

# name: (width, depth, heads). B to 3B: paper, table 1, and NAR's M; 1B, 7B and XXXL have no published weights.
SIZES = {
    "B": (768, 12, 12),
    "M": (1024, 18, 16),  # NAR only
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "1B": (2048, 22, 32),
    "3B": (3200, 24, 32),  # head size 100
    "XXXL": (2560, 48, 40),
    "7B": (4096, 32, 32),
}
CONDITIONINGS = ("class", "words", "text")
# Buffers that some files carry; they are computed, never loaded.
COMPUTED = ("freqs_cis", "kv_cache", "causal_mask")
# First part of a key that only this family has.
MARKS = {"spe_tok_embeddings": "PAR", "medusa_output": "NAR", "abs_pe": "NAR video", "adaln_before_head": "RAR"}


def size_config(size: str) -> dict[str, int]:
    """Constructor arguments of a named size (`SIZES`)."""
    if size not in SIZES:
        raise VgenError(f"unknown model size {size!r}{nearest(size, SIZES)}; sizes: {', '.join(SIZES)}")
    return dict(zip(("width", "depth", "heads"), SIZES[size]))


@dataclass
class LlamaState:
    """Memory of one run."""

    cache: KVCache
    prefix: Tensor  # [R * B, T, width]: embedded conditions, fed in the first call
    prefix_mask: Tensor  # [R * B, T] bool
    rope: Tensor  # [N, D/2, 2]: the table of the grid, by position
    filled: Tensor  # [slots] bool: which slots hold a token (LlamaGen)
    length: int  # slots filled from the front (PAR, NAR)
    rows: int  # R
    counters: Counters


@dataclass(frozen=True)
class Plan:
    """One call: the rows of the rope table and the slots of what enters, what it sees, and which outputs answer."""

    rope: Tensor  # [f, D/2, 2] or [R * B, f, D/2, 2]
    slots: slice | Tensor  # [f]
    length: int  # slots that are read
    mask: Mask  # over them
    reads: Tensor | None = None  # [m] rows of the fed tokens; None: all


class LlamaBackbone(ClassConditional, Checkpointed, Generator, nn.Module):
    """Embeddings, blocks and head of the family, and what does not depend on how tokens are arranged."""

    family: ClassVar[str]
    size_config = staticmethod(size_config)
    _supports_gradient_checkpointing = True
    _repeated_blocks = ("LlamaBlock",)
    _no_split_modules = ("LlamaBlock",)

    def build(self, conditionings: Sequence[str], prefix_tokens: int | None = None, extra_layers: int = 0) -> None:
        """Makes the modules from `self.config`; `extra_layers` blocks behind the trunk (NAR)."""
        config = self.config
        width, heads = config.width, config.heads
        if width % heads or width // heads % 4:
            raise VgenError(
                f"width {width} over {heads} heads must give a head size that is a multiple of 4, got {width / heads:g}"
            )
        self.set_vocabulary(conditionings)
        self.set_grids(config.grid)
        if self.grid[0] != 1:
            raise VgenError(f"{self.family} makes pictures: the grid must be HxW, got {self.grid}")
        if config.conditioning == "text":
            self.prefix_tokens = prefix_tokens or config.caption_tokens
            self.cls_embedding = TextEmbedding(config.caption_width, config.caption_tokens, width)
        else:
            self.prefix_tokens = 1
            self.cls_embedding = ClassEmbedding(config.classes, width, null=config.condition_dropout > 0)
        self.tok_embeddings = nn.Embedding(config.codes, width)
        self.tok_dropout = nn.Dropout(config.token_dropout)
        hidden = config.hidden or llama_hidden(width)
        self.layers = nn.ModuleList(
            LlamaBlock(width, heads, hidden, config.residual_dropout, config.ffn_dropout, config.attention_dropout)
            for _ in range(config.depth + extra_layers)
        )
        self.norm = RMSNorm(width)
        self.output = nn.Linear(width, config.codes, bias=False)
        self.gradient_checkpointing = False

    def init_weights(self) -> None:
        """N(0, 0.02) for every matrix and table, then zeros in the head, so that the first loss is ln(codes)."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.normal_(part.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    # ---------------------------------------------------------------- files

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> Self:
        """A model with fresh weights of a published size; `changes` are further constructor arguments."""
        return cls(**{**cls.size_config(size), **changes})

    @classmethod
    def from_original(cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any]) -> Self:
        """A model from a published file, flat or nested (ema, model, module, state_dict), or from its state dict.

        config: a size of SIZES, or constructor arguments. Raises VgenError for a file of another family or size.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        state = {key: value for key, value in state.items() if not any(name in key for name in COMPUTED)}
        found = next((MARKS[key.split(".")[0]] for key in state if key.split(".")[0] in MARKS), cls.family)
        if found != cls.family:
            raise VgenError(f"this is a {found} checkpoint, expected {cls.family}: load it with the {found} model")
        with torch.device("meta"):
            model = cls.of_size(config) if isinstance(config, str) else cls(**config)
        load_exactly(model, state)
        return model.eval()

    from_single_file = from_original

    def read_words(self, paths: Mapping[str, Path]) -> None:
        """Loads the text encoder of a text-conditional model from `paths["text_encoder"]` (a folder)."""
        if self.config.conditioning == "text":
            self.vocabulary = T5Captions.from_pretrained(str(paths["text_encoder"]), self.config.caption_tokens)

    # ---------------------------------------------------------------- conditions

    def null(self, condition: Condition) -> Condition:
        """The unconditional row of guidance for `condition`. Text: the mask of the prompt stays, as published."""
        if self.config.condition_dropout == 0:
            raise VgenError(
                f"this {self.family} was trained without dropping conditions, so it has no guidance; use scale 1"
            )
        if self.config.conditioning == "text":
            return self.cls_embedding.null(condition)
        return super().null(condition)

    def drop(self, condition: Condition, uniform: Tensor | None = None) -> Condition:
        """Training: every sample becomes unconditional with probability `condition_dropout`. uniform: [B] draws."""
        share = self.config.condition_dropout
        if share == 0:
            return condition
        if self.config.conditioning != "text":
            return super().drop(condition, uniform)
        batch, device = condition.mask.shape[0], condition.mask.device
        uniform = torch.rand(batch, device=device) if uniform is None else uniform
        return self.cls_embedding.drop(condition, uniform < share)

    def check_condition(self, condition: Condition) -> None:
        """Raises VgenError unless `condition` is of the model's kind. Synchronises: once a run."""
        if self.config.conditioning != "text":
            super().check_condition(condition)
            return
        features = condition.extras.get("features")
        expected = (self.config.caption_tokens, self.config.caption_width)
        if features is None or tuple(features.shape[1:]) != expected:
            found = "none" if features is None else f"{list(features.shape)}"
            raise VgenError(f"this model takes caption features [B, {expected[0]}, {expected[1]}], got {found}")

    def _prefix(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Embedded condition [B, T, width] and its mask [B, T]."""
        prefix, mask = self.cls_embedding(condition)
        return prefix[:, : self.prefix_tokens], mask[:, : self.prefix_tokens]

    # ---------------------------------------------------------------- blocks

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.config.width // self.config.heads

    def rope(self, grid: Grid | None = None) -> Tensor:
        """[N, D/2, 2]: rope of every position, by its own cell (not that of the token it predicts)."""
        _, height, width = grid or self.grid
        return rope2d_table(height, width, self.head_dim, self.config.theta).to(self.device)

    def sequence_rope(self, positions: Tensor) -> Tensor:
        """Rope rows of the condition and then of `positions` ([n], -1 for learned tokens), for teacher forcing."""
        prefix = torch.full((self.prefix_tokens,), -1, device=self.device)
        return take_rows(self.rope(), torch.cat((prefix, positions.to(self.device))))

    def sequence_mask(self, mask: Tensor, prefix_mask: Tensor) -> Tensor:
        """Hides the padding [B, T] in a mask [L, L]; a padded slot still sees itself. [L, L] or [B, 1, L, L]."""
        if prefix_mask.shape[1] == 1:
            return mask
        visible = F.pad(prefix_mask, (0, len(mask) - prefix_mask.shape[1]), value=True)
        itself = torch.eye(len(mask), dtype=torch.bool, device=mask.device)
        return (mask & visible[:, None, None, :]) | itself

    def trunk(self, x: Tensor, rope: Tensor, mask: Mask, layers: slice = slice(None)) -> Tensor:
        """The blocks `layers` without a cache."""
        for block in self.layers[layers]:
            x = self._checkpointed(block, x, rope, mask)
        return x

    def loss(self, condition: Condition, tokens: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy in nats per token, fp32, and accuracy. tokens [B, N] in raster order; valid [B]: samples that count.

        The recipe drops a share of the conditions first (`drop`).
        """
        logits = self(condition, tokens)
        losses = F.cross_entropy(rearrange(logits.float(), "b n v -> b v n"), tokens, reduction="none")
        weight = torch.ones_like(losses) if valid is None else valid[:, None].to(losses).expand_as(losses)
        right = (logits.detach().argmax(dim=-1) == tokens).to(losses)
        total = weight.sum().clamp_min(1)
        return {"loss": (losses * weight).sum() / total, "accuracy": (right * weight).sum() / total}

    # ---------------------------------------------------------------- decoding

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> LlamaState:
        """Embeds the conditions, one per guidance row; they enter with the first call."""
        if canvas.grid[0] != 1:
            raise VgenError(f"{self.family} makes pictures: the canvas must be HxW, got {canvas.grid}")
        for condition in conditions:
            self.check_condition(condition)
        prefixes, masks = zip(*(self._prefix(condition) for condition in conditions))
        prefix = torch.cat(prefixes)
        slots = self.prefix_tokens + grid_size(canvas.grid)
        heads, layers = self.config.heads, len(self.layers)
        cache = KVCache(layers, len(prefix), heads, slots, self.head_dim, self.device, prefix.dtype)
        filled = torch.zeros(slots, dtype=torch.bool, device=self.device)
        rope = self.rope(canvas.grid)
        return LlamaState(cache, prefix, torch.cat(masks), rope, filled, 0, len(conditions), Counters())

    def next_slots(self, state: LlamaState, rope: Tensor) -> Plan:
        """The next slots from the front; what enters sees all of them and everything before (PAR, NAR)."""
        slots = slice(state.length, state.length + rope.shape[-3])
        mask: Mask = None
        if self.prefix_tokens > 1:
            mask = F.pad(state.prefix_mask, (0, slots.stop - self.prefix_tokens), value=True)[:, None, None, :]
            if state.length == 0:
                causal = torch.ones(slots.stop, slots.stop, dtype=torch.bool, device=self.device).tril()
                mask = self.sequence_mask(causal, state.prefix_mask)
        return Plan(rope, slots, slots.stop, mask)

    def embed_fresh(self, state: LlamaState, canvas: Canvas) -> Tensor:
        """What the last step wrote: embeddings [R * B, f, width]."""
        return self.tok_embeddings(canvas.values.gather(1, canvas.fresh).repeat(state.rows, 1))

    def extend(self, state: LlamaState, plan: Plan, x: Tensor, layers: slice = slice(None)) -> Tensor:
        """Runs blocks over new tokens [R * B, f, width] and stores their keys and values. Device only."""
        for layer in range(len(self.layers))[layers]:
            x = self.layers[layer](x, plan.rope, plan.mask, Memory(state.cache, layer, plan.slots, plan.length))
        return x
