"""Hi-MAR: a small picture first, then the whole one around it (arXiv 2505.20288, "Hierarchical Masked Autoregressive Models
with Low-Resolution Token Pivots").

One masked autoencoder (mar_backbone.py) decodes two grids, the canvas's two levels, in two phases. In the first it makes the
low-resolution tokens, each by MAR's head. Its decoder states at the moment when they were made are the *pivots*: the
second phase sees them in the place of the low-resolution tokens, and makes the dense tokens with a head that denoises the
whole grid at once. A vector of the phase scales and gates every block.

Where the paper and the released code differ, this is the code (docs/families/himar.md lists it). Parameter names are those of
the released files. Shapes: B batch, R guidance rows, Ns low-resolution and L dense tokens of C channels, S = Ns + L, m targets,
D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.layers.modulation import Modulation
from vgen.layers.vit import ViTBlock
from vgen.models.mar.backbone import (
    EPS,
    AutoencoderState,
    MaskedAutoencoder,
    Stack,
    mask_rate,
    put_rows,
    shown_positions,
)
from vgen.models.mar.heads import TokenDiffusion
from vgen.models.mar.himar_head import GridDenoiser
from vgen.models.masked.base import at_targets
from vgen.samplers.choice import DiffusionChoice, PhaseChoice
from vgen.samplers.orders import make_order
from vgen.samplers.orders.base import BaseOrder
from vgen.samplers.orders.levels import LevelsOrder
from vgen.samplers.predictions import Diffusion, GridDiffusion
from vgen.samplers.settings import Sampling
from vgen.samplers.types import Canvas, Condition, Grid, Step, as_grid, grid_size

LOW, DENSE = 0, 1  # phases, and levels of the canvas
LOW_STEPS = 4  # calls of the first phase for every row of its grid, as released: 32 for 8 x 8
DENSE_STEPS = 4  # of the second phase (Hi-MAR-H: 12)
LOW_SEED = 1 << 32  # added to the seed of the low-resolution order; seeds of users are below it
LOSS_WEIGHTS = (0.4, 0.6)  # released: 64/320 * 2 and 256/320 * 0.75, also for other grids
DENSE_MASKS = ("cosine", "normal")  # how the share of masked dense tokens is drawn
DENSE_RATE_MIN = 0.38  # its least value where that is "normal"
# Table 1 and the released files: (width, layers of encoder and decoder each, heads, width and layers of the first head,
# width, layers and heads of the second)
SHAPES = {
    "B": (768, 12, 12, 1024, 6, 512, 6, 8),  # 244 M parameters
    "L": (1024, 16, 16, 1280, 8, 512, 8, 8),  # 529 M
    "H": (1280, 20, 16, 1536, 12, 768, 12, 12),  # 1.09 B
}


def size(
    width: int,
    layers: int,
    heads: int,
    head_width: int,
    head_layers: int,
    grid_head_width: int,
    grid_head_layers: int,
    grid_head_heads: int,
) -> dict[str, Any]:
    """Constructor arguments of a published size."""
    return {
        "channels": 16,
        "grid": [1, 16, 16],
        "low_grid": [1, 8, 8],
        "width": width,
        "encoder_layers": layers,
        "encoder_heads": heads,
        "decoder_layers": layers,
        "decoder_heads": heads,
        "head_width": head_width,
        "head_layers": head_layers,
        "grid_head_width": grid_head_width,
        "grid_head_layers": grid_head_layers,
        "grid_head_heads": grid_head_heads,
    }


class PhasedBlock(ViTBlock):
    """ViTBlock whose branches are scaled and gated by a vector of the phase: x += gate · attention(norm x · (1 + scale)), and so on."""

    def __init__(self, width: int, heads: int, hidden: int, **options):
        super().__init__(width, heads, hidden, **options)
        self.adaLN_scale = nn.Parameter(torch.zeros(2, 1, 1, 4 * width))
        # Gates are used raw, so the shift opens them: a plain block at the start.
        self.adaLN_shift = nn.Parameter(torch.tensor((0.0, 1.0, 0.0, 1.0)).repeat_interleave(width).repeat(2, 1, 1, 1))

    def forward(self, x: Tensor, vector: Tensor, phase: int) -> Tensor:
        """x [B, N, D], vector [4D] of the stack and phase -> [B, N, D]."""
        modulation = vector * self.adaLN_scale[phase] + self.adaLN_shift[phase]
        scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
        dropout = self.attention_dropout if self.training else 0.0
        x = x + gate1 * self.dropout(self.attn(self.norm1(x) * (1 + scale1), dropout=dropout))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2))


@dataclass
class HiMARState(AutoencoderState):
    """Memory of one run. pivots [R * B, Ns, D]: states of the conditional row, in all rows; given [R * B, Ns] bool: what was known
    at the start and so has none; visible_low: known low-resolution tokens a sample (`visible`: dense ones)."""

    pivots: Tensor = field(kw_only=True)
    given: Tensor = field(kw_only=True)
    visible_low: int = field(kw_only=True)


class HiMARChoice(PhaseChoice):
    """100 substeps in the first phase and 250 in the second, unless asked for others."""

    @classmethod
    def of(cls, settings: Sampling) -> HiMARChoice:
        """`substeps` are those of the second phase, `low_substeps` those of the first; the rest is for both."""
        low = replace(settings, substeps="100" if settings.low_substeps is None else settings.low_substeps)
        dense = replace(settings, substeps="250" if settings.substeps is None else settings.substeps)
        return cls((DiffusionChoice.of(low), DiffusionChoice.of(dense)))


class HiMARModel(MaskedAutoencoder, ModelMixin, ConfigMixin):
    """Class- or caption-conditional generator of continuous tokens in two phases (module docstring).

    channels: C of a token, scaled as its tokenizer gives it. grid, low_grid: of the dense and of the low-resolution tokens.
    width: of both stacks; encoder_*, decoder_*: their layers and heads; mlp_ratio: hidden width of their MLPs over the width.
    buffer: copies of the class vector. head_width, head_layers: of the first phase's head; grid_head_*: of the second's,
    whose width is a multiple of 4. conditioning, classes: see `ClassConditional`.

    In training: condition_dropout: share of samples without a condition, drawn for either phase; mask_ratio_min: the least
    share of masked low-resolution tokens; dense_masks: how that of dense tokens is drawn, "cosine" or "normal" (`dense_rate`);
    pivot_rate: share of samples whose second phase sees the pivots (the others see a learned table in their place);
    dropout, attention_dropout: of both stacks; diffusion_batch: noise levels per token and step.
    """

    SIZES: ClassVar = {name: size(*shape) for name, shape in SHAPES.items()}
    choice_kind = HiMARChoice
    _repeated_blocks = ("PhasedBlock", "ModulatedBlock")
    _no_split_modules = ("PhasedBlock", "ModulatedBlock")

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        grid: Sequence[int] = (1, 16, 16),
        low_grid: Sequence[int] = (1, 8, 8),
        width: int = 768,
        encoder_layers: int = 12,
        encoder_heads: int = 12,
        decoder_layers: int = 12,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        buffer: int = 64,
        head_width: int = 1024,
        head_layers: int = 6,
        grid_head_width: int = 512,
        grid_head_layers: int = 6,
        grid_head_heads: int = 8,
        grid_head_mlp_ratio: float = 4.0,
        conditioning: str = "class",
        classes: int = 1000,
        condition_dropout: float = 0.1,
        mask_ratio_min: float = 0.7,
        dense_masks: str = "cosine",
        pivot_rate: float = 0.25,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        diffusion_batch: int = 4,
    ):
        super().__init__()
        self.set_vocabulary()
        grids: tuple[Grid, Grid] = (as_grid(low_grid), as_grid(grid))
        if any(frames != 1 for frames, _, _ in grids):
            raise VgenError(f"Hi-MAR makes one picture: grids (1, H, W), got {grids[DENSE]} and {grids[LOW]}")
        if dense_masks not in DENSE_MASKS:
            raise VgenError(f"the masks of dense tokens are drawn {' or '.join(DENSE_MASKS)}, got {dense_masks!r}")
        low, dense = map(grid_size, grids)
        self.cond_proj = nn.Linear(channels, width)
        self.cond_z_proj = nn.Linear(width, width)
        self.cond_tokens = nn.Parameter(torch.empty(1, low, channels))
        for stack in ("encoder", "decoder"):
            self.register_module(f"{stack}_task_emb", nn.Embedding(2, width))
            self.register_module(f"{stack}_blocks_ada", Modulation(width, 4))
        self.build_autoencoder(
            grid=grid,
            channels=channels,
            encoder=Stack(width, encoder_layers, encoder_heads),
            decoder=Stack(width, decoder_layers, decoder_heads),
            block=lambda stack: PhasedBlock(
                stack.width,
                stack.heads,
                int(stack.width * mlp_ratio),
                eps=EPS,
                dropout=dropout,
                attention_dropout=attention_dropout,
            ),
            positions=2 * (buffer + low + dense),  # rows of the first phase, then of the second
            blanks=2 * (low + dense),
            outputs=low + dense,
        )
        self.set_grids(*grids)
        nn.init.normal_(self.cond_tokens, std=0.02)
        self.diffloss = TokenDiffusion(channels, width, head_width, head_layers)
        self.cond_diffloss = GridDenoiser(
            grids[DENSE],
            channels,
            width,
            grid_head_width,
            grid_head_layers,
            grid_head_heads,
            grid_head_mlp_ratio,
        )
        self.diffloss.reset_parameters()
        self.cond_diffloss.reset_parameters()

    # ---------------------------------------------------------------- the network

    def run(self, context: tuple[Tensor], phase: int, x: Tensor, masked: Tensor, visible: int) -> Tensor:
        """Features [B, S, D] of all positions, low-resolution ones first. Device only.

        phase: LOW or DENSE; x [B, S, D]: embedded tokens; masked [B, S] bool, False at exactly `visible` positions of every
        sample: what stands at the others does not matter.
        """
        shown = shown_positions(masked, visible)
        rows = _rows(phase, self.config.buffer + x.shape[1])
        blanks = self.mask_token[:, _rows(phase, x.shape[1])]
        vector = self.encoder_blocks_ada(self.encoder_task_emb.weight[phase])
        x = self.encode(context[0], x, shown, self.encoder_pos_embed_learned[:, rows], (vector, phase))
        vector = self.decoder_blocks_ada(self.decoder_task_emb.weight[phase])
        return self.complete(x, shown, blanks, self.decoder_pos_embed_learned[:, rows], (vector, phase))

    def low_features(self, context: tuple[Tensor], low: Tensor, masked: Tensor, visible: int) -> Tensor:
        """The first phase: features [B, S, D] from low-resolution tokens [B, Ns, C] alone; masked [B, Ns], `visible` False a row.

        The dense tokens take their places in the decoder, all masked; given ones (inpainting), too, as in training.
        """
        dense = grid_size(self.grid)
        x = F.pad(self.cond_proj(low.to(self.dtype)), (0, 0, 0, dense))
        return self.run(context, LOW, x, F.pad(masked, (0, dense), value=True), visible)

    def dense_features(
        self, context: tuple[Tensor], pivots: Tensor, tokens: Tensor, masked: Tensor, visible: int
    ) -> Tensor:
        """The second phase: features [B, L, D] of the dense places. pivots [B, Ns, D] of `embed_pivots`; tokens [B, L, C]; masked [B, L],
        `visible` False a row."""
        low = pivots.shape[1]
        x = torch.cat((pivots, self.z_proj(tokens.to(self.dtype))), dim=1)
        return self.run(context, DENSE, x, F.pad(masked, (low, 0), value=False), low + visible)[:, low:]

    def embed_pivots(self, states: Tensor, made: Tensor) -> Tensor:
        """What the second phase sees in the places of the low-resolution tokens: [B, Ns, D].

        states [B, Ns, D]: of the first phase; made [B, Ns] bool: where they count. Elsewhere stands the learned table: tokens
        that were given to the first phase have no state of their own.
        """
        return torch.where(made[..., None], self.cond_z_proj(states), self.cond_proj(self.cond_tokens))

    def forward(self, condition: Condition, phase: int, x: Tensor, masked: Tensor, visible: int) -> Tensor:
        """Features [B, S, D] of all positions, as `run`."""
        return self.run(self.context(condition), phase, x, masked, visible)

    # ---------------------------------------------------------------- training

    def dense_rate(self, uniform: float) -> float:
        """The share of dense tokens that training masks, from a draw of U(0, 1)."""
        if self.config.dense_masks == "cosine":
            return math.cos(math.pi / 2 * uniform)
        return mask_rate(uniform, DENSE_RATE_MIN)

    def steered(self, uniform: Tensor, ramp: float = 1.0) -> Tensor:
        """Which samples' second phase sees the pivots, [B] bool, from draws of U(0, 1). ramp: factor of `pivot_rate` (0 to 1)."""
        return uniform > 1 - self.config.pivot_rate * ramp

    def loss(
        self,
        condition: Condition,
        tokens: Tensor,
        low: Tensor,
        low_shown: Tensor | None = None,
        shown: Tensor | None = None,
        drops: Tensor | None = None,
        steered: Tensor | None = None,
        low_times: Tensor | None = None,
        low_noise: Tensor | None = None,
        times: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Both phases' losses and their sum by LOSS_WEIGHTS. tokens [B, L, C], low [B, Ns, C]: of the same pictures. What is None is drawn.

        low_shown [B, v], shown [B, v']: the tokens that either phase knows, equally many in every sample (`draw_shown`); drops
        [2, B]: draws of U(0, 1) that drop conditions, which here is not the caller's matter because either phase drops its
        own; steered [B] bool: see `steered`. Of the heads, for k = `diffusion_batch` rounds over the batch: low_times
        [k * B * Ns], low_noise [k * B * Ns, C]; times [k * B], noise [k * B, L, C].
        """
        device, rounds = tokens.device, self.config.diffusion_batch
        if low_shown is None:
            low_shown = self.draw_shown(torch.rand(low.shape[:2], device=device).argsort(dim=1))
        if shown is None:
            rate = self.dense_rate(float(torch.rand(())))
            shown = self.draw_shown(torch.rand(tokens.shape[:2], device=device).argsort(dim=1), rate)
        drops = torch.rand(2, len(tokens), device=device) if drops is None else drops
        steered = self.steered(torch.rand(len(tokens), device=device)) if steered is None else steered
        first, second = (self.context(self.drop(condition, uniform)) for uniform in drops)
        low_masked, masked = _hidden(low, low_shown), _hidden(tokens, shown)

        states = self.low_features(first, low, low_masked, low_shown.shape[1])[:, : low.shape[1]]
        features, targets = (part.flatten(0, 1).repeat(rounds, 1) for part in (states, low))
        weight = low_masked.flatten().repeat(rounds).to(targets)
        coarse = self.diffloss.loss(features, targets, weight, low_times, low_noise)

        # The second phase does not train the first through the pivots.
        pivots = self.embed_pivots(states.detach(), low_masked & steered[:, None])
        features = self.dense_features(second, pivots, tokens, masked, shown.shape[1])
        features, targets = (part.repeat(rounds, 1, 1) for part in (features, tokens))
        fine = self.cond_diffloss.loss(features, targets, masked.repeat(rounds, 1), times, noise)
        loss = LOSS_WEIGHTS[LOW] * coarse["loss"] + LOSS_WEIGHTS[DENSE] * fine["loss"]
        return {"loss": loss, "low_mse": coarse["mse"], "low_bits": coarse["bits"], "dense_mse": fine["mse"]}

    # ---------------------------------------------------------------- decoding (TokenModel)

    def default_order(self) -> BaseOrder:
        """That of the dense level: random, in the 4 calls of the published figures. `over_levels` puts the first phase before it."""
        return make_order("random", self.grid, steps=min(DENSE_STEPS, grid_size(self.grid)), schedule="mar")

    def over_levels(self, order: BaseOrder, low_steps: int | None = None, seed: int = 0) -> BaseOrder:
        """`order` of the dense level as the second phase, a random order of the low-resolution level as the first.

        low_steps: its calls (None: 4 for every row of the low grid, as released, or a token a call where there are fewer).
        Raises VgenError for more steps than tokens.
        """
        grid = self.grids[LOW]
        steps = min(LOW_STEPS * grid[1], grid_size(grid)) if low_steps is None else low_steps
        first = make_order("random", grid, steps=steps, schedule="mar", seed=seed + LOW_SEED)
        return LevelsOrder((first, order))

    def check_order(self, order: BaseOrder) -> None:
        """Raises VgenError unless `order` decodes the two levels one after the other."""
        if not isinstance(order, LevelsOrder) or order.levels != self.grids:
            raise VgenError(
                f"Hi-MAR decodes a small grid and then a dense one, the order {order.name!r} has other levels; "
                "make it with HiMARModel.over_levels(order of the dense grid)"
            )

    @torch.no_grad()
    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> HiMARState:
        """Embeds the conditions and counts what is known on either level. Raises VgenError where samples know unequally many tokens."""
        if canvas.levels != self.grids:
            raise VgenError(f"this Hi-MAR fills a canvas of the levels {self.grids}, got {canvas.levels}")
        state = super().start(conditions, canvas)
        low, dense = (canvas.part(level) for level in (LOW, DENSE))
        known = [part.values.shape[1] - part.unknown_count() for part in (low, dense)]
        given = low.known.repeat(state.rows, 1)
        pivots = torch.zeros(*given.shape, self.config.width, dtype=self.dtype, device=given.device)
        return HiMARState(
            state.context,
            state.rows,
            state.counters,
            visible=known[DENSE],
            pivots=pivots,
            given=given,
            visible_low=known[LOW],
        )

    @torch.no_grad()
    def predict(self, state: HiMARState, step: Step, canvas: Canvas) -> Diffusion | GridDiffusion:
        """One call of the autoencoder: R * B rows of Ns + L positions in either phase."""
        low, dense = (canvas.part(level) for level in (LOW, DENSE))
        rows, places = state.rows, canvas.values.shape[1]
        state.counters.add(rows * canvas.batch, self.config.buffer + places)  # of the decoder, the longer sequence
        if step.phase == LOW:
            values, masked = low.values.repeat(rows, 1, 1), ~low.known.repeat(rows, 1)
            features = self.low_features(state.context, values, masked, state.visible_low)
            parts = at_targets(features, step, rows)
            self._keep_pivots(state, step, parts[0])
            return self.diffloss.prediction(parts)
        values, masked = dense.values.repeat(rows, 1, 1), ~dense.known.repeat(rows, 1)
        pivots = self.embed_pivots(state.pivots, ~state.given)
        features = self.dense_features(state.context, pivots, values, masked, state.visible)
        parts = rearrange(features, "(r b) l d -> r b l d", r=rows)
        return self.cond_diffloss.prediction(parts, dense.values, ~dense.known, first=low.values.shape[1])

    @staticmethod
    def _keep_pivots(state: HiMARState, step: Step, states: Tensor) -> None:
        """Stores states [B, m, D] of the conditional row for all rows, as released. A target that does not stay is asked for again."""
        places = step.targets.to(states.device).expand(len(states), step.size).repeat(state.rows, 1)
        state.pivots = put_rows(state.pivots, places, states.repeat(state.rows, 1, 1))

    def commit(self, state: HiMARState, step: Step, canvas: Canvas) -> None:
        """Counts what became known."""
        if step.phase == LOW:
            state.visible_low += step.keep
        else:
            state.visible += step.keep


def _rows(phase: int, size: int) -> slice:
    """The rows of a phase in a table of both."""
    return slice(phase * size, (phase + 1) * size)


def _hidden(tokens: Tensor, shown: Tensor) -> Tensor:
    """The mask [B, N] bool of tokens [B, N, C]: True but at shown [B, v]."""
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, shown, False)
