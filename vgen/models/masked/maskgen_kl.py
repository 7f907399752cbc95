"""MaskGen-KL: text to TA-TiTok's continuous tokens: masked prediction with MAR's per-token diffusion (arXiv 2501.07730, 2406.11838).

The backbone of MaskGen-VQ gives a feature vector for every token; a small network (`DiffusionHead`) denoises each unknown
token from it. Orders are random, as in MAR.

Parameter names are those of the released files. Shapes: B batch, R guidance rows, L tokens of C channels, m targets, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vgen.layers.joint import ScaleShiftNorm
from vgen.layers.sinusoid import interleaved
from vgen.models.mar.heads import TokenDiffusion
from vgen.models.masked.base import MaskedState, at_targets, mask_share
from vgen.models.masked.maskgen import WIDTHS, MaskGen
from vgen.samplers.choice import DiffusionChoice
from vgen.samplers.orders import make_order
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.predictions import Diffusion
from vgen.samplers.types import Canvas, Condition, Step, grid_size

EPS = 1e-6


class MaskGenKLModel(MaskGen, ModelMixin, ConfigMixin):
    """Text-conditional generator of continuous tokens (module docstring).

    channels: C of a token, scaled as its tokenizer gives it; head_width, head_layers: of the diffusion head; diffusion_batch:
    noise levels per token and training step. The other arguments are those of `MaskGenVQModel`.
    """

    choice_kind = DiffusionChoice
    SIZES: ClassVar = {
        name: {"channels": 16, "grid": [1, 1, 32], **shape, "head_width": shape["width"], "head_layers": 8}
        for name, shape in WIDTHS.items()
    }

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        grid: Sequence[int] = (1, 1, 32),
        width: int = 1024,
        layers: int = 16,
        heads: int = 16,
        head_width: int = 1024,
        head_layers: int = 8,
        text_width: int = 768,
        micro_width: int = 256,
        aesthetic: float = 6.5,
        condition_dropout: float = 0.1,
        mask_schedule: str = "arccos",
        diffusion_batch: int = 4,
    ):
        super().__init__()
        self.vocabulary = None
        self.set_stack(grid, width, heads)
        length = grid_size(self.grid)
        self.z_proj = nn.Linear(channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=EPS)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, width))
        self.text_emb = nn.Linear(text_width, width)
        self.text_pooled_emb = nn.Linear(text_width + micro_width, width)
        self.decoder_blocks = self.joint_blocks(layers, width, heads)
        self.decoder_norm = ScaleShiftNorm(width)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, length, width))
        self.diffloss = TokenDiffusion(channels, width, head_width, head_layers)
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier for every linear layer (also those that MAR starts at zero: here this comes last), N(0, 0.02) for the tables."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        for table in (self.mask_token, self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned):
            nn.init.normal_(table, std=0.02)

    # ---------------------------------------------------------------- the backbone

    def context(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """The text stream [B, T, D] and the modulating vector [B, D]."""
        return self.text_emb(self.text_inputs(condition)), self.text_pooled_emb(
            self.pooled_inputs(condition, interleaved)
        )

    def run(self, context: tuple[Tensor, Tensor], tokens: Tensor, masked: Tensor) -> Tensor:
        """tokens [B, L, C], masked [B, L] bool (what stands there does not matter) -> features [B, L, D]. Device only."""
        x = self.z_proj_ln(self.z_proj(tokens.to(self.dtype)))
        x = torch.where(masked[..., None], self.mask_token, x) + self.decoder_pos_embed_learned
        return self.trunk(self.decoder_blocks, self.decoder_norm, x, *context) + self.diffusion_pos_embed_learned

    def forward(self, condition: Condition, tokens: Tensor, masked: Tensor) -> Tensor:
        """Features [B, L, D] of all tokens."""
        return self.run(self.context(condition), tokens, masked)

    # ---------------------------------------------------------------- training

    def draw_mask(self, uniform: Tensor, orders: Tensor) -> Tensor:
        """[B, L] bool: the first entries of every order, equally many in the whole batch. uniform [1] or [], orders [B, L]."""
        length = orders.shape[1]
        count = (length * mask_share(uniform, self.config.mask_schedule)).ceil()
        first = torch.arange(length, device=orders.device).expand_as(orders) < count
        return torch.zeros_like(first).scatter(1, orders, first)

    def loss(
        self,
        condition: Condition,
        tokens: Tensor,
        uniform: Tensor | None = None,
        orders: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Diffusion loss of the masked ones of tokens [B, L, C]: squared error of the noise plus the variational bound in bits.

        uniform [1]: draw of U(0, 1) that says how many tokens are masked; orders [B, L]: permutations whose first entries
        are; timesteps [k * B * L] int64 and noise [k * B * L, C]: of the diffusion, k = `diffusion_batch` rounds over all tokens.
        """
        device = tokens.device
        uniform = torch.rand(1, device=device) if uniform is None else uniform
        orders = torch.rand(tokens.shape[:2], device=device).argsort(dim=1) if orders is None else orders
        masked = self.draw_mask(uniform, orders)
        rounds = self.config.diffusion_batch
        features = self(condition, tokens, masked).flatten(0, 1).repeat(rounds, 1)  # whole rounds, not row by row
        target, weight = tokens.flatten(0, 1).repeat(rounds, 1), masked.flatten().repeat(rounds).to(tokens)
        return self.diffloss.loss(features, target, weight, timesteps, noise)

    # ---------------------------------------------------------------- decoding (TokenModel)

    def default_order(self) -> BaseOrder:
        """Random, a token a call."""
        return make_order("random", self.grid, steps=grid_size(self.grid))

    @torch.no_grad()
    def predict(self, state: MaskedState, step: Step, canvas: Canvas) -> Diffusion:
        """One call of the backbone over the whole picture: R * B rows."""
        tokens, masked = canvas.values.repeat(state.rows, 1, 1), ~canvas.known.repeat(state.rows, 1)
        features = self.run(state.context, tokens, masked)
        state.counters.add(*masked.shape)
        return self.diffloss.prediction(at_targets(features, step, state.rows))
