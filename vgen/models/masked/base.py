"""What masked generators share (MaskGIT, arXiv 2202.04200): unknown tokens are masked, every call recomputes the whole picture.

A family says what its network makes of a condition (`context`, once a run) and of the tokens (`run`). Nothing is cached:
attention is bidirectional, so every token that becomes known changes all others. Known tokens are simply not masked, which
makes inpainting free, and any order can be followed: what is unknown is masked, whatever is asked for next.

Shapes: B batch, R guidance rows, L tokens of a picture, m targets, D width, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vgen.checkpoints import load_exactly, read_state_dict
from vgen.errors import VgenError, nearest
from vgen.layers.transformer import Checkpointed
from vgen.models.base import Generator
from vgen.samplers.predictions import Logits
from vgen.samplers.types import Canvas, Condition, Counters, Step, grid_size
from vgen.sizes import NamedSizes

# Share of the tokens that is masked in training, as a function of t ~ U(0, 1) (MaskGIT, section 3.3; MUSE, arXiv 2301.00704).
MASK_SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "arccos": lambda t: t.acos() / (math.pi / 2),
    "cosine": lambda t: (t * (math.pi / 2)).cos(),
    "square": lambda t: 1 - t.square(),
    "root": lambda t: 1 - t.sqrt(),
    "linear": lambda t: 1 - t,
}


def mask_share(uniform: Tensor, schedule: str = "arccos") -> Tensor:
    """Shares of masked tokens for draws of U(0, 1), in [1e-6, 1]."""
    if schedule not in MASK_SCHEDULES:
        raise VgenError(
            f"a mask schedule is one of {', '.join(MASK_SCHEDULES)}, got {schedule!r}{nearest(schedule, MASK_SCHEDULES)}"
        )
    return MASK_SCHEDULES[schedule](uniform).clamp(1e-6, 1.0)


def draw_mask(uniform: Tensor, permutation: Tensor, schedule: str = "arccos") -> Tensor:
    """[B, L] bool, True where masked: at least one token a sample. uniform [B]; permutation [B, L] of 0 … L - 1."""
    length = permutation.shape[1]
    count = (length * mask_share(uniform, schedule)).round().clamp_min(1)  # round: half to even, as released
    return permutation < count[:, None]


def masked_token_loss(
    logits: Tensor, tokens: Tensor, masked: Tensor, unmasked_weight: float = 0.1, label_smoothing: float = 0.1
) -> dict[str, Tensor]:
    """Cross-entropy in nats, weight 1 on masked tokens and `unmasked_weight` on the others, and accuracy on masked tokens.

    logits [B, L, V], tokens [B, L] int64, masked [B, L] bool. The accuracy is the mean over samples of each one's own.
    """
    loss = F.cross_entropy(
        rearrange(logits.float(), "b l v -> b v l"), tokens, reduction="none", label_smoothing=label_smoothing
    )
    shown = masked.to(loss)
    weight = torch.where(masked, 1.0, unmasked_weight)
    right = (logits.detach().argmax(dim=-1) == tokens) * shown
    return {
        "loss": (loss * weight).sum() / (weight.sum() + 1e-8),
        "accuracy": (right.sum(dim=1) / shown.sum(dim=1).clamp_min(1)).mean(),
    }


@dataclass
class MaskedState:
    """Memory of one run: what the network reads of the conditions, [R * B, …] each."""

    context: tuple[Tensor, ...]
    rows: int  # R
    counters: Counters


class MaskedModel(NamedSizes, Checkpointed, Generator):
    """Files and the start of a run. IGNORED: first parts of keys that may be left over."""

    IGNORED: ClassVar[tuple[str, ...]] = ()
    _supports_gradient_checkpointing = True

    def set_stack(self, grid: Sequence[int], width: int, heads: int) -> None:
        """Called by constructors. Raises VgenError for heads that do not divide the width."""
        if width % heads:
            raise VgenError(f"width {width} must be a multiple of the {heads} heads")
        self.set_grids(grid)
        self.gradient_checkpointing = False

    # ---------------------------------------------------------------- files

    @classmethod
    def from_original(cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any]) -> Self:
        """A model from a released file (flat state dict) or its state dict.

        config: a size of SIZES or constructor arguments. Raises VgenError for another file, family or size.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        with torch.device("meta"):
            model = cls(**(cls.size_config(config) if isinstance(config, str) else config))
        load_exactly(model, model.own_state(state), cls.IGNORED)
        return model.eval()

    from_single_file = from_original

    def own_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a released file under the model's names."""
        return state

    # ---------------------------------------------------------------- conditions

    def context(self, condition: Condition) -> tuple[Tensor, ...]:
        """What the network reads of a condition: tensors [B, …], made once a run."""
        raise NotImplementedError

    # ---------------------------------------------------------------- decoding (TokenModel)

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> MaskedState:
        """Embeds the conditions, one per guidance row."""
        length = sum(map(grid_size, self.grids))
        if canvas.values.shape[1] != length:
            raise VgenError(
                f"this {type(self).__name__} makes {length} tokens a picture, the canvas has {canvas.values.shape[1]}"
            )
        for condition in conditions:
            self.check_condition(condition)
        parts = zip(*(self.context(condition) for condition in conditions))
        return MaskedState(tuple(torch.cat(part) for part in parts), len(conditions), Counters())


class MaskedTokenModel(MaskedModel):
    """Masked generators of codes. Config: codes, mask_schedule, unmasked_weight, label_smoothing."""

    def run(self, context: tuple[Tensor, ...], ids: Tensor) -> Tensor:
        """ids [B, L] int64, `codes` where masked -> logits [B, L, V]. Device only."""
        raise NotImplementedError

    def forward(self, condition: Condition, ids: Tensor) -> Tensor:
        """Logits [B, L, V] of all tokens; ids [B, L] int64, `config.codes` where masked."""
        return self.run(self.context(condition), ids)

    def loss(
        self, condition: Condition, tokens: Tensor, uniform: Tensor | None = None, permutation: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The masked-token loss and accuracy of tokens [B, L] under a random mask (`draw_mask`).

        uniform: [B] draws of U(0, 1), which say how many tokens are masked; permutation: [B, L], which ones.
        """
        device, config = tokens.device, self.config
        uniform = torch.rand(len(tokens), device=device) if uniform is None else uniform
        permutation = torch.rand(tokens.shape, device=device).argsort(dim=1) if permutation is None else permutation
        masked = draw_mask(uniform, permutation, config.mask_schedule)
        logits = self(condition, tokens.masked_fill(masked, config.codes))
        return masked_token_loss(logits, tokens, masked, config.unmasked_weight, config.label_smoothing)

    @torch.no_grad()
    def predict(self, state: MaskedState, step: Step, canvas: Canvas) -> Logits:
        """One call over the whole picture: R * B rows."""
        ids = canvas.values.masked_fill(~canvas.known, self.config.codes).repeat(state.rows, 1)
        logits = self.run(state.context, ids)
        state.counters.add(*ids.shape)
        return Logits(at_targets(logits, step, state.rows))


def at_targets(outputs: Tensor, step: Step, rows: int) -> Tensor:
    """Outputs [R * B, L, …] of all positions -> [R, B, m, …] of the targets of a step."""
    outputs = rearrange(outputs, "(r b) l d -> r b l d", r=rows)
    batch = torch.arange(outputs.shape[1], device=outputs.device)[:, None]
    targets = step.targets.to(outputs.device).expand(len(batch), step.size)
    return outputs[:, batch, targets]


def init_weights(module: nn.Module, std: float = 0.02, truncated: bool = True) -> None:
    """(Truncated) normal for linear layers and embeddings, zero biases; norms keep their ones."""
    draw = nn.init.trunc_normal_ if truncated else nn.init.normal_
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            draw(part.weight, std=std)
            if getattr(part, "bias", None) is not None:
                nn.init.zeros_(part.bias)
