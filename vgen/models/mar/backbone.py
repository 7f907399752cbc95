"""The masked autoencoder of MAR (arXiv 2406.11838, sections 3.3 and 4; after MAE, arXiv 2111.06377), shared with
TokenBridge (arXiv 2503.16430), which has other tokens and another head, and extended by Hi-MAR (arXiv 2505.20288).

The encoder sees the known tokens only, behind `buffer` copies of the class vector; the decoder puts them back in their
places, learned mask tokens in all others, and gives a feature vector for every position, from which a head makes tokens.
Attention is bidirectional over what is known, so nothing is cached: every call recomputes the picture.

How many tokens are known is a host integer and the same in every sample, so that the known ones can be gathered without
waiting for the device: `run` takes it as `visible`, a run of decoding counts it in its state, and training draws the known
positions themselves (`draw_shown`). Parameter names are those of MAR's released files.

Shapes: B batch, R guidance rows, L tokens of C channels, v known tokens, nb buffer, D width of the encoder or decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.checkpoints import read_state_dict
from vgen.errors import VgenError
from vgen.models.conditions.classes import ClassConditional, mean_vector
from vgen.models.masked.base import MaskedModel, MaskedState, at_targets
from vgen.samplers.types import Canvas, Condition, Step, grid_size

EPS = 1e-6
MASK_RATE = NormalDist(mu=1.0, sigma=0.25)  # cut off to [mask_ratio_min, 1]: MAR, section 4


@dataclass(frozen=True)
class Stack:
    """Shape of the encoder or the decoder. Raises VgenError for heads that do not divide the width."""

    width: int
    layers: int
    heads: int

    def __post_init__(self):
        if self.width % self.heads:
            raise VgenError(f"width {self.width} must be a multiple of the {self.heads} heads")


@dataclass
class AutoencoderState(MaskedState):
    """Memory of one run, which also counts the known tokens of a sample: a host integer, never read from the device."""

    visible: int = 0


class MaskedAutoencoder(ClassConditional, MaskedModel):
    """What the families share. A constructor calls `set_vocabulary`, `build_autoencoder`, and adds its head.

    Config entries read here: `buffer`, `classes`, `conditioning`, `condition_dropout`, `mask_ratio_min`. OUTPUT_TABLE:
    the name of the position table that is added to the features.
    """

    OUTPUT_TABLE: ClassVar[str] = "diffusion_pos_embed_learned"
    least_guidance: ClassVar[float] = 1.0

    @classmethod
    def from_original(
        cls, source: str | Path | Mapping[str, Tensor], config: str | Mapping[str, Any], entry: str = "model_ema"
    ) -> Self:
        """As `MaskedModel.from_original`. entry: of a released file, `model_ema` (averaged, as sampled) or `model`."""
        state = source if isinstance(source, Mapping) else read_state_dict(source, (entry,))
        return super().from_original(state, config)

    from_single_file = from_original

    def build_autoencoder(
        self,
        *,
        grid: Sequence[int],
        channels: int,
        encoder: Stack,
        decoder: Stack,
        block: Callable[[Stack], nn.Module],
        positions: int | None = None,
        blanks: int = 1,
        outputs: int | None = None,
    ) -> None:
        """Makes and initialises the parameters that all families have. Raises VgenError for impossible sizes.

        block: one layer of a stack (`ViTBlock`). Rows of the tables, where they are not MAR's: positions (buffer + L) in
        front of both stacks, blanks (mask tokens: 1 for all places), outputs (L) behind the decoder.
        """
        self.set_stack(grid, encoder.width, encoder.heads)
        length, buffer = grid_size(self.grid), self.config.buffer
        if buffer < 1:  # the first call sees nothing else
            raise VgenError(f"the buffer holds at least 1 copy of the class vector, got {buffer}")
        if not 0 <= self.config.mask_ratio_min <= 1:
            raise VgenError(f"mask_ratio_min is a share of the tokens, 0 to 1, got {self.config.mask_ratio_min}")
        positions, outputs = positions or buffer + length, outputs or length
        self.class_emb = nn.Embedding(self.config.classes, encoder.width)
        self.fake_latent = nn.Parameter(torch.empty(1, encoder.width))
        self.z_proj = nn.Linear(channels, encoder.width)
        self.z_proj_ln = nn.LayerNorm(encoder.width, eps=EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, positions, encoder.width))
        self.encoder_blocks = nn.ModuleList(block(encoder) for _ in range(encoder.layers))
        self.encoder_norm = nn.LayerNorm(encoder.width, eps=EPS)
        self.decoder_embed = nn.Linear(encoder.width, decoder.width)
        self.mask_token = nn.Parameter(torch.empty(1, blanks, decoder.width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, positions, decoder.width))
        self.decoder_blocks = nn.ModuleList(block(decoder) for _ in range(decoder.layers))
        self.decoder_norm = nn.LayerNorm(decoder.width, eps=EPS)
        self.register_parameter(self.OUTPUT_TABLE, nn.Parameter(torch.empty(1, outputs, decoder.width)))
        self._init_autoencoder()

    def _init_autoencoder(self) -> None:
        """Xavier for linear layers (queries, keys and values as one matrix), zero biases, N(0, 0.02) for the tables."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        tables = (
            self.class_emb.weight,
            self.fake_latent,
            self.mask_token,
            self.encoder_pos_embed_learned,
            self.decoder_pos_embed_learned,
            self.output_positions,
        )
        for table in tables:
            nn.init.normal_(table, std=0.02)

    @property
    def output_positions(self) -> Tensor:
        """The table [1, L, D] that is added to the features."""
        return getattr(self, self.OUTPUT_TABLE)

    # ---------------------------------------------------------------- the network

    def context(self, condition: Condition) -> tuple[Tensor]:
        """The class vector [B, D]; that of the null class is `fake_latent`, which stands behind the classes as in `ClassVocabulary`."""
        table = torch.cat((self.class_emb.weight, self.fake_latent))
        rows = F.embedding(condition.ids.to(table.device), table)
        return (mean_vector(rows, condition.mask.to(table.device)),)

    def run(self, context: tuple[Tensor], tokens: Tensor, masked: Tensor, visible: int) -> Tensor:
        """Features [B, L, D] of all positions. Device only.

        tokens [B, L, C] float: what stands at masked positions does not matter; masked [B, L] bool, False at exactly
        `visible` positions of every sample.
        """
        shown = shown_positions(masked, visible)
        x = self.encode(context[0], self.z_proj(tokens.to(self.dtype)), shown, self.encoder_pos_embed_learned)
        return self.complete(x, shown, self.mask_token, self.decoder_pos_embed_learned)

    def forward(self, condition: Condition, tokens: Tensor, masked: Tensor, visible: int) -> Tensor:
        """Features [B, L, D] of all tokens, as `run`."""
        return self.run(self.context(condition), tokens, masked, visible)

    def encode(self, vector: Tensor, x: Tensor, shown: Tensor, positions: Tensor, extras: Sequence[Any] = ()) -> Tensor:
        """The encoder over buffer and known tokens: [B, nb + v, D].

        vector [B, D]: of the condition; x [B, L, D]: projected tokens; shown [B, v]: known positions, ascending;
        positions [1, nb + L, D]; extras: further arguments of every block.
        """
        buffer = self.config.buffer
        known = take_rows(x + positions[:, buffer:], shown)
        # The norm comes after the positions, and only what stays is normalised: it works on every token by itself.
        x = self.z_proj_ln(torch.cat((vector[:, None] + positions[:, :buffer], known), dim=1))
        for block in self.encoder_blocks:
            x = self._checkpointed(block, x, *extras)
        return self.encoder_norm(x)

    def complete(
        self, x: Tensor, shown: Tensor, blanks: Tensor, positions: Tensor, extras: Sequence[Any] = ()
    ) -> Tensor:
        """The decoder over buffer and all positions, without the buffer: features [B, L, D].

        x [B, nb + v, D]: of the encoder; blanks [1, 1 or L, D]: mask tokens; shown, positions, extras as in `encode`.
        """
        buffer = self.config.buffer
        first, known = self.decoder_embed(x).tensor_split((buffer,), dim=1)
        length = positions.shape[1] - buffer
        places = put_rows(blanks.to(known.dtype).expand(len(x), length, -1), shown, known)
        x = torch.cat((first, places), dim=1) + positions
        for block in self.decoder_blocks:
            x = self._checkpointed(block, x, *extras)
        return self.decoder_norm(x)[:, buffer:] + self.output_positions

    # ---------------------------------------------------------------- training

    def draw_shown(self, orders: Tensor, rate: float | None = None) -> Tensor:
        """Known positions [B, v] of a training batch, ascending: the first ceil(L * rate) entries of every order are masked.

        orders [B, L]: permutations; rate: share of masked tokens, the same for the whole batch (None: a draw of `mask_rate`).
        """
        rate = mask_rate(float(torch.rand(())), self.config.mask_ratio_min) if rate is None else rate
        return orders[:, math.ceil(orders.shape[1] * rate) :].sort(dim=1).values

    def masked_features(
        self, condition: Condition, tokens: Tensor, shown: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features [B, L, D] of tokens [B, L, C] of which the model knows those at `shown` [B, v], and the mask [B, L].

        shown None: drawn. Pictures are conditioned as `condition` says: dropping it is the caller's.
        """
        if shown is None:
            shown = self.draw_shown(torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1))
        masked = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, shown, False)
        return self(condition, tokens, masked, shown.shape[1]), masked

    # ---------------------------------------------------------------- decoding (TokenModel)

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> AutoencoderState:
        """Embeds the conditions and counts what is known. Raises VgenError where samples know unequally many tokens."""
        state = super().start(conditions, canvas)
        visible = canvas.values.shape[1] - canvas.unknown_count()
        return AutoencoderState(state.context, state.rows, state.counters, visible)

    def target_features(self, state: AutoencoderState, step: Step, canvas: Canvas, tokens: Tensor) -> Tensor:
        """One call of the network over the whole picture: features [R, B, m, D] of the targets of a step.

        tokens [B, L, C] float: the values of the canvas as the encoder takes them.
        """
        tokens, masked = tokens.repeat(state.rows, 1, 1), ~canvas.known.repeat(state.rows, 1)
        features = self.run(state.context, tokens, masked, state.visible)
        state.counters.add(len(masked), self.config.buffer + masked.shape[1])  # of the decoder, the longer sequence
        return at_targets(features, step, state.rows)

    def commit(self, state: AutoencoderState, step: Step, canvas: Canvas) -> None:
        """Counts what became known."""
        state.visible += step.keep


def mask_rate(uniform: float, low: float) -> float:
    """A draw of N(1, 0.25²) cut off to [low, 1], from a draw of U(0, 1): the share of tokens that training masks."""
    below = MASK_RATE.cdf(low)
    return max(low, MASK_RATE.inv_cdf(below + uniform * (0.5 - below)))


def shown_positions(masked: Tensor, visible: int) -> Tensor:
    """[B, visible] int64, ascending: where masked [B, L] is False."""
    return masked.to(torch.int8).argsort(dim=1, stable=True)[:, :visible]


def take_rows(x: Tensor, positions: Tensor) -> Tensor:
    """[B, L, D], positions [B, v] -> [B, v, D]."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def put_rows(x: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """x [B, L, D] with rows [B, v, D] at positions [B, v]."""
    return x.scatter(1, positions[..., None].expand_as(rows), rows)
