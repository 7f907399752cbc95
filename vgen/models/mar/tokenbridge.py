"""TokenBridge's generator: random orders of tokens whose channels are discrete (arXiv 2503.16430).

MAR's masked autoencoder reads the tokens as the floats that their levels stand for, never as embeddings, and gives a
feature vector for every unknown token; a causal head (tokenbridge_head.py) makes the channels of it, one after another.
Guidance mixes the feature vectors, so the head runs once a token.

The tokenizer, in vgen.tokenizers_vis.tokenbridge, has the same quantizer: generator files bring its tables.

Shapes: B batch, R guidance rows, L tokens of C channels, V levels, v known tokens, m targets, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vgen.checkpoints import read_state_dict
from vgen.errors import VgenError
from vgen.models.conditions.classes import token_loss
from vgen.models.mar.backbone import AutoencoderState, MaskedAutoencoder, Stack, shown_positions, take_rows
from vgen.models.mar.mar import size, vit_block
from vgen.models.mar.tokenbridge_head import ChannelHead
from vgen.samplers.orders import make_order
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.predictions import Channels
from vgen.samplers.types import Canvas, Condition, Step, grid_size
from vgen.tokenizers_vis.base import check_tokens
from vgen.tokenizers_vis.latents.dimensionwise import DimensionwiseQuantizer
from vgen.tokenizers_vis.tokenbridge import TokenBridge

# The channels of MAR's KL-16, low frequencies first: a constant of the released code, in no file.
KL16_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
# The paper and the released files: (width, layers of encoder and decoder each, heads, width and layers of the head)
SHAPES = {
    "B": (768, 12, 12, 768, 4),  # 218 M parameters, never published
    "L": (1024, 16, 16, 1024, 4),  # 487 M
    "H": (1280, 20, 16, 1024, 6),  # 910 M
}
# First part of a released name -> our module that holds it.
RENAMED = {
    **dict.fromkeys(("reconstruction_values", "boundaries"), "quantizer"),
    **dict.fromkeys(("condition_proj", "channel_embed", "timesteps_embeddings", "token_embeddings"), "head"),
    **dict.fromkeys(("channel_blocks", "channel_norm", "channel_final", "channel_heads"), "head"),
}


class TokenBridgeModel(MaskedAutoencoder, ModelMixin, ConfigMixin):
    """Class- or caption-conditional generator of tokens [B, L, C] int64 (module docstring).

    channels: C; levels: V. low, high, std_range: of the quantizer, as in the tokenizer. channel_order: the channels in the
    order in which the head makes them (None: as they are stored). grid: of the tokens. encoder_*, decoder_*: the two stacks;
    head_*: the head; mlp_ratio: hidden width of all MLPs over the width. buffer: copies of the class vector. conditioning,
    classes: see `ClassConditional`.

    In training: condition_dropout: share of samples without a condition; mask_ratio_min: the least share of masked tokens;
    dropout, attention_dropout: of both stacks (the head has none).
    """

    OUTPUT_TABLE = "output_pos_embed"
    IGNORED = ("channel_mask",)  # the head's causal mask: a constant
    SIZES: ClassVar = {
        name: {**size(*shape), "levels": 64, "head_heads": 8, "channel_order": list(KL16_ORDER)}
        for name, shape in SHAPES.items()
    }
    _repeated_blocks = ("ViTBlock", "ModulatedBlock")
    _no_split_modules = ("ViTBlock", "ModulatedBlock")

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        levels: int = 64,
        low: float = -5.0,
        high: float = 5.0,
        std_range: float = 3.0,
        channel_order: Sequence[int] | None = None,
        grid: Sequence[int] = (1, 16, 16),
        encoder_width: int = 768,
        encoder_layers: int = 12,
        encoder_heads: int = 12,
        decoder_width: int = 768,
        decoder_layers: int = 12,
        decoder_heads: int = 12,
        head_width: int = 768,
        head_layers: int = 4,
        head_heads: int = 8,
        mlp_ratio: float = 4.0,
        buffer: int = 64,
        conditioning: str = "class",
        classes: int = 1000,
        condition_dropout: float = 0.1,
        mask_ratio_min: float = 0.7,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
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
        self.quantizer = DimensionwiseQuantizer(low=low, high=high, std_range=std_range, levels=levels)
        self.head = ChannelHead(
            channels=channels,
            levels=levels,
            features=decoder_width,
            width=head_width,
            layers=head_layers,
            heads=head_heads,
            hidden=int(head_width * mlp_ratio),
            order=range(channels) if channel_order is None else channel_order,
        )
        self.head.reset_parameters()

    # ---------------------------------------------------------------- files, and the tokenizer

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any], entry: str = "model_ema"
    ) -> Self:
        """As in MAR, but the averages of a released file are parameters only: the quantizer's tables are those in `model`."""
        state = source if isinstance(source, Mapping) else read_state_dict(source, ("model",), overlay=entry)
        return super().from_original(state, config)

    from_single_file = from_original

    def own_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a released file under the model's names."""
        return renamed(state)

    def share_tables(self, tokenizer: ModelMixin) -> None:
        """Gives the tokenizer of a pipeline the tables of this model: those of released files decide near ties.

        Raises VgenError for a tokenizer that reads levels in another way.
        """
        own = {name: self.config[name] for name in ("levels", "low", "high", "std_range")}
        if not isinstance(tokenizer, TokenBridge):
            raise VgenError(f"this model makes the tokens of a TokenBridge tokenizer, got a {type(tokenizer).__name__}")
        found = {name: getattr(tokenizer.quantizer, name) for name in own}
        if found != own:
            expected, got = (", ".join(f"{name} {value:g}" for name, value in part.items()) for part in (own, found))
            raise VgenError(f"the tokenizer quantises with {got}, this model was made for {expected}")
        tokenizer.quantizer.load_state_dict(self.quantizer.state_dict())

    def set_channel_order(self, order: Sequence[int]) -> None:
        """The channels in the order in which a model that is still to be trained makes them."""
        self.head.set_order(order, self.config.channels)
        self.register_to_config(channel_order=list(order))

    # ---------------------------------------------------------------- training

    def quantised(self, tokens: Tensor) -> Tensor:
        """Levels [B, L, C] int64 of scaled latents [B, L, C], or of what are levels already. VgenError for other shapes."""
        shape = (grid_size(self.grid), self.config.channels)
        if tokens.shape[1:] != shape:
            raise VgenError(
                f"this model takes {shape[0]} tokens of {shape[1]} channels a picture, got {list(tokens.shape)}"
            )
        return self.quantizer.encode(tokens) if tokens.is_floating_point() else tokens

    def loss(self, condition: Condition, tokens: Tensor, shown: Tensor | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy in nats per channel of the masked tokens, and accuracy.

        tokens [B, L, C]: scaled latents (sampled anew in every epoch, as in the paper) or their levels; shown [B, v] int64: the
        tokens that the encoder sees, equally many in every sample (`draw_shown`; None: drawn).
        """
        levels = self.quantised(tokens)
        if shown is None:
            shown = self.draw_shown(torch.rand(levels.shape[:2], device=levels.device).argsort(dim=1))
        features, masked = self.masked_features(condition, self.quantizer.decode(levels), shown)
        hidden = shown_positions(~masked, masked.shape[1] - shown.shape[1])  # [B, L - v]
        features, targets = (take_rows(part, hidden).flatten(0, 1) for part in (features, levels))
        return token_loss(self.head(features, targets), targets)

    # ---------------------------------------------------------------- decoding (TokenModel)

    def default_order(self) -> BaseOrder:
        """Random, in 64 calls or fewer: the published figures have a call for every token, which is much slower."""
        return make_order("random", self.grid, steps=min(64, grid_size(self.grid)), schedule="mar")

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> AutoencoderState:
        """Embeds the conditions. Raises VgenError for a canvas of other tokens, or with levels out of range."""
        if canvas.values.is_floating_point():
            raise VgenError("this model makes levels, so the canvas must hold integers; quantise known latents first")
        check_tokens(self.quantised(canvas.values), self.config.levels)
        return super().start(conditions, canvas)

    @torch.no_grad()
    def predict(self, state: AutoencoderState, step: Step, canvas: Canvas) -> Channels:
        """One call of the autoencoder: R * B rows. Unknown positions hold level 0, which the encoder never sees."""
        features = self.target_features(state, step, canvas, self.quantizer.decode(canvas.values))
        return Channels(features, self.head.sample)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict under the model's names: head and quantizer are modules of their own here."""
    parts = ((RENAMED.get(key.split(".")[0]), key, value) for key, value in state.items())
    return {f"{part}.{key}" if part else key: value for part, key, value in parts}
