"""MAR: random orders of continuous tokens, each made by a per-token head (arXiv 2406.11838, "Autoregressive Image Generation
without Vector Quantization").

The masked autoencoder of mar_backbone.py gives a feature vector for every unknown token; a small head makes the token of
it. Published is the diffusion head; the others of heads.py can be trained in its place.

Patches of several latents are the tokenizer's matter (`packing` of KLModel): what arrives here are tokens of C channels. Parameter names are those of the released files. Shapes as in mar_backbone.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vgen.layers.vit import ViTBlock
from vgen.models.mar.backbone import EPS, AutoencoderState, MaskedAutoencoder, Stack
from vgen.models.mar.heads import head_kind
from vgen.samplers.orders import make_order
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.predictions import Diffusion, Flow, MeanFlow
from vgen.samplers.types import Canvas, Condition, Step, grid_size

# MAR, table 3 and the released files: (width, layers of encoder and decoder each, heads, width and layers of the head)
SHAPES = {
    "B": (768, 12, 12, 1024, 6),  # 208 M parameters
    "L": (1024, 16, 16, 1280, 8),  # 478 M
    "H": (1280, 20, 16, 1536, 12),  # 942 M
}


def size(width: int, layers: int, heads: int, head_width: int, head_layers: int) -> dict[str, object]:
    """Constructor arguments of a published size."""
    stacks = {
        f"{stack}_{name}": value
        for stack in ("encoder", "decoder")
        for name, value in (("width", width), ("layers", layers), ("heads", heads))
    }
    return {"channels": 16, "grid": [1, 16, 16], **stacks, "head_width": head_width, "head_layers": head_layers}


class MARModel(MaskedAutoencoder, ModelMixin, ConfigMixin):
    """Class- or caption-conditional generator of continuous tokens (module docstring).

    channels: C of a token, scaled as its tokenizer gives it. grid: of the tokens. encoder_*, decoder_*: the two stacks, whose
    widths may differ; mlp_ratio: hidden width of their MLPs over the width. buffer: copies of the class vector. head: a name
    of HEADS, with its width and number of blocks. conditioning, classes: see `ClassConditional`.

    In training: condition_dropout: share of samples without a condition; mask_ratio_min: the least share of masked tokens;
    dropout, attention_dropout: of both stacks; diffusion_batch: noise levels per token and step.
    """

    SIZES: ClassVar = {name: size(*shape) for name, shape in SHAPES.items()}
    _repeated_blocks = ("ViTBlock",)
    _no_split_modules = ("ViTBlock",)

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        grid: Sequence[int] = (1, 16, 16),
        encoder_width: int = 768,
        encoder_layers: int = 12,
        encoder_heads: int = 12,
        decoder_width: int = 768,
        decoder_layers: int = 12,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        buffer: int = 64,
        head: str = "diffusion",
        head_width: int = 1024,
        head_layers: int = 6,
        conditioning: str = "class",
        classes: int = 1000,
        condition_dropout: float = 0.1,
        mask_ratio_min: float = 0.7,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        diffusion_batch: int = 4,
    ):
        super().__init__()
        self.set_vocabulary()
        self.build_autoencoder(
            grid=grid,
            channels=channels,
            encoder=Stack(encoder_width, encoder_layers, encoder_heads),
            decoder=Stack(decoder_width, decoder_layers, decoder_heads),
            block=partial(vit_block, mlp_ratio=mlp_ratio, dropout=dropout, attention_dropout=attention_dropout),
        )
        self.diffloss = head_kind(head)(channels, decoder_width, head_width, head_layers)
        self.diffloss.reset_parameters()

    @property
    def choice_kind(self) -> type:
        """The kind of settings that the head takes when it draws."""
        return self.diffloss.choice_kind

    # ---------------------------------------------------------------- training

    def loss(
        self,
        condition: Condition,
        tokens: Tensor,
        shown: Tensor | None = None,
        times: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The head's loss of the masked ones of tokens [B, L, C], and its figures.

        shown [B, v] int64: the tokens that the encoder sees, equally many in every sample (`draw_shown`); times and noise
        of the head, for n = k * B * L rows: k = `diffusion_batch` rounds over the whole batch (not k times row by row).
        """
        features, masked = self.masked_features(condition, tokens, shown)
        rounds = self.config.diffusion_batch
        features, targets = (part.flatten(0, 1).repeat(rounds, 1) for part in (features, tokens))
        # Known tokens have rows, too, of weight 0: as released, and without a gather whose size the device would decide.
        return self.diffloss.loss(features, targets, masked.flatten().repeat(rounds).to(targets), times, noise)

    # ---------------------------------------------------------------- decoding (TokenModel)

    def default_order(self) -> BaseOrder:
        """Random, in 64 calls or fewer: the published figures have a call for every token, which is much slower."""
        return make_order("random", self.grid, steps=min(64, grid_size(self.grid)), schedule="mar")

    @torch.no_grad()
    def predict(self, state: AutoencoderState, step: Step, canvas: Canvas) -> Diffusion | Flow | MeanFlow:
        """One call of the autoencoder: R * B rows."""
        return self.diffloss.prediction(self.target_features(state, step, canvas, canvas.values))


def vit_block(stack: Stack, mlp_ratio: float, dropout: float, attention_dropout: float) -> ViTBlock:
    """A layer of either stack."""
    hidden = int(stack.width * mlp_ratio)
    return ViTBlock(stack.width, stack.heads, hidden, eps=EPS, dropout=dropout, attention_dropout=attention_dropout)
