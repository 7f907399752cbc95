"""MaskGen-VQ: text to TA-TiTok's 1-D codes by masked prediction (arXiv 2501.07730); what it shares with MaskGen-KL.

An MM-DiT (joint blocks of Stable Diffusion 3): the image stream is [L tokens], the text stream 77 CLIP states; every norm is
modulated by the pooled caption and, as a micro-condition, the aesthetic score the picture should have.

Parameter names are those of the released files. Shapes: B batch, R guidance rows, L tokens, T text tokens, D width, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.layers.joint import JointBlock, ScaleShiftNorm
from vgen.layers.sinusoid import sin_cos
from vgen.models.conditions.clip import ClipCaptions
from vgen.models.masked.base import MaskedModel, MaskedTokenModel, init_weights
from vgen.samplers.guidance import ClassifierFree
from vgen.samplers.orders import make_order
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.types import Condition, grid_size

SCALE = 100.0  # of the aesthetic score before its sinusoidal features
WIDTHS = {"L": {"width": 1024, "layers": 16, "heads": 16}, "XL": {"width": 1280, "layers": 20, "heads": 16}}


class MaskGen(MaskedModel):
    """Captions and blocks of both variants. Config: text_width, micro_width, aesthetic, condition_dropout.

    A condition has extras: text [B, T, C] and pooled [B, C] (`ClipCaptions`), optionally aesthetic [B].
    """

    _repeated_blocks = ("JointBlock",)
    _no_split_modules = ("JointBlock",)
    vocabulary: ClipCaptions | None  # captions to conditions

    def read_words(self, paths: Mapping[str, Path]) -> None:
        """Loads what makes conditions of captions: the CLIP text tower in the folder `paths["text_encoder"]`."""
        self.vocabulary = ClipCaptions.from_pretrained(str(paths["text_encoder"]))

    def joint_blocks(self, layers: int, width: int, heads: int) -> nn.ModuleList:
        """The blocks; the last one drops the text."""
        return nn.ModuleList(JointBlock(width, heads, last=layer == layers - 1) for layer in range(layers))

    def pooled_inputs(self, condition: Condition, sinusoid: Callable[[Tensor, int], Tensor]) -> Tensor:
        """[B, C + micro_width]: the pooled caption and the features of 100 x the aesthetic score."""
        pooled = condition.extras["pooled"].to(self.device, self.dtype)
        width = self.config.micro_width
        if width == 0:
            return pooled
        score = condition.extras.get("aesthetic")
        score = pooled.new_full((len(pooled),), self.config.aesthetic) if score is None else score.to(self.device)
        return torch.cat((pooled, sinusoid(SCALE * score, width).to(pooled)), dim=-1)

    def text_inputs(self, condition: Condition) -> Tensor:
        """[B, T, C] text states."""
        return condition.extras["text"].to(self.device, self.dtype)

    def trunk(self, blocks: nn.ModuleList, norm: ScaleShiftNorm, x: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """x [B, L, D], text [B, T, D], pooled [B, D] -> [B, L, D]."""
        for block in blocks:
            x, text = self._checkpointed(block, x, text, pooled)
        return norm(x, pooled)

    # ---------------------------------------------------------------- conditions

    def check_condition(self, condition: Condition) -> None:
        """Raises VgenError unless `condition` has caption states and a pooled caption of the model's width."""
        text, pooled = condition.extras.get("text"), condition.extras.get("pooled")
        width = self.config.text_width
        if text is None or pooled is None or text.shape[-1] != width or pooled.shape != (len(text), width):
            found = {name: list(value.shape) for name, value in condition.extras.items()}
            raise VgenError(
                f"{type(self).__name__} takes CLIP features, text [B, T, {width}] and pooled [B, {width}]; found {found or 'none'}"
            )

    def null(self, condition: Condition) -> Condition:
        """The empty caption, with the aesthetic score of `condition`: the unconditional row of guidance."""
        if self.vocabulary is None:
            raise VgenError(
                "the null condition is an empty caption: set `model.vocabulary` to ClipCaptions, or use scale 1"
            )
        return self._with_score(self.vocabulary.null(len(condition.mask)), condition)

    def drop(self, condition: Condition, uniform: Tensor | None = None) -> Condition:
        """Training: captions become empty with probability `condition_dropout`. uniform: [B] draws."""
        null = self.null(condition)
        batch, device = len(condition.mask), condition.mask.device
        uniform = torch.rand(batch, device=device) if uniform is None else uniform
        rows = torch.where(uniform < self.config.condition_dropout, batch, 0) + torch.arange(batch, device=device)
        both = Condition(
            torch.cat((condition.ids, null.ids)),
            torch.cat((condition.mask, null.mask)),
            {name: torch.cat((condition.extras[name], null.extras[name])) for name in ("text", "pooled")},
        )
        return self._with_score(both.take(rows), condition)

    @staticmethod
    def _with_score(condition: Condition, source: Condition) -> Condition:
        score = source.extras.get("aesthetic")
        extras = condition.extras if score is None else {**condition.extras, "aesthetic": score}
        return Condition(condition.ids, condition.mask, extras)


class MaskGenVQModel(MaskGen, MaskedTokenModel, ModelMixin, ConfigMixin):
    """Text-conditional generator of codes (module docstring).

    codes: visual vocabulary; grid: (1, 1, L); width, layers, heads: as in SIZES; text_width: of the CLIP states;
    micro_width: features of the aesthetic score (0: no micro-condition); aesthetic: the score where a condition has none;
    spare_rows: rows of the embedding table behind codes and mask, never used but part of every file; head_rows: rows of a
    head of its own (None: the head is the embedding table); condition_dropout, mask_schedule, unmasked_weight,
    label_smoothing: of the training.
    """

    SIZES: ClassVar = {name: {"codes": 8192, "grid": [1, 1, 128], **shape} for name, shape in WIDTHS.items()}

    @register_to_config
    def __init__(
        self,
        codes: int = 8192,
        grid: Sequence[int] = (1, 1, 128),
        width: int = 1024,
        layers: int = 16,
        heads: int = 16,
        text_width: int = 768,
        micro_width: int = 256,
        aesthetic: float = 6.5,
        spare_rows: int = 1001,
        head_rows: int | None = None,
        condition_dropout: float = 0.1,
        mask_schedule: str = "arccos",
        unmasked_weight: float = 0.1,
        label_smoothing: float = 0.1,
    ):
        super().__init__()
        self.vocabulary = None
        self.set_stack(grid, width, heads)
        self.embeddings = nn.Embedding(codes + 1 + spare_rows, width)
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size(self.grid), width))
        self.text_embed_proj = nn.Linear(text_width, width)
        self.cond_pooled_proj = nn.Linear(text_width + micro_width, width)
        self.blocks = self.joint_blocks(layers, width, heads)
        self.norm = ScaleShiftNorm(width)
        self.lm_head = None if head_rows is None else nn.Linear(width, head_rows)
        self._init_weights()

    def _init_weights(self) -> None:
        """Truncated normal 0.02; zeros in the two norms that are modulated by (scale, shift), but in no other modulation."""
        init_weights(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for norm in (self.norm, self.blocks[-1].norm1_context):
            nn.init.zeros_(norm.linear.weight)

    def own_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Files of tied models may hold the embedding table twice."""
        if self.lm_head is None and "lm_head.weight" in state:
            state = dict(state)
            copy = state.pop("lm_head.weight")
            if "lm_head.bias" in state or not torch.equal(copy, state.get("embeddings.weight", copy)):
                raise VgenError(
                    f"this file has a head of its own ({len(copy)} rows), the model ties it to the embeddings; set head_rows"
                )
        return state

    @staticmethod
    def guidance(scale: float, schedule: str = "step-cosine", power: float = 1.0) -> ClassifierFree:
        """Guidance in the paper's scale s: c + s (c - u) with s running from 1 to `scale` along `schedule`."""
        return ClassifierFree(1 + scale, schedule, power, start=2.0)

    def default_order(self) -> BaseOrder:
        """By confidence, in 16 calls at the most, with the released noise."""
        return make_order("confidence", self.grid, steps=min(16, grid_size(self.grid)), temperature=2.0)

    def context(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """The text stream [B, T, D] and the modulating vector [B, D]."""
        # The score's longest period is 1000 here, and its sines come first; in MaskGen-KL both differ.
        pooled = self.pooled_inputs(condition, lambda score, width: sin_cos(score, width, period=1000.0))
        return self.text_embed_proj(self.text_inputs(condition)), self.cond_pooled_proj(pooled)

    def run(self, context: tuple[Tensor, Tensor], ids: Tensor) -> Tensor:
        """ids [B, L] -> logits [B, L, codes]."""
        x = self.trunk(self.blocks, self.norm, self.embeddings(ids) + self.pos_embed, *context)
        codes = self.config.codes
        if self.lm_head is not None:
            return self.lm_head(x)[..., :codes]
        return F.linear(x, self.embeddings.weight[:codes])
