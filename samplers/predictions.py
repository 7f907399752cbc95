"""What a model says about a step's positions, and how to draw from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from vgen.errors import VgenError
from vgen.kernels.choose_tokens import choose_tokens, keep_likeliest
from vgen.samplers.choice import DiffusionChoice, FlowChoice, PhaseChoice, TokenChoice
from vgen.samplers.diffusion import GaussianDiffusion, solver
from vgen.samplers.flow import even_times, flow_solver, shifted_times
from vgen.samplers.guidance import ClassifierFree, is_weighted_sum
from vgen.samplers.noise import CHANNELS, DIFFUSION, TOKENS
from vgen.samplers.types import Draw, Guidance, Noise, Step


@dataclass(frozen=True)
class Logits:
    """Independent categorical distributions: logits [R, B, m, V], one part per guidance row."""

    logits: Tensor

    def draw(self, step: Step, guidance: Guidance, choice: TokenChoice, noise: Noise, stream: int = TOKENS) -> Draw:
        """Mixes, filters and draws in one kernel. Draw.score is what `choice.score` says, before the filters.

        A guidance that mixes in a way of its own does so before the kernel.
        """
        if not is_weighted_sum(guidance):
            mixed = guidance.mix(self.logits, guidance.weights(step))
            return Logits(mixed[None]).draw(step, ClassifierFree(), choice, noise, stream)
        choice, weights = choice.at(step), guidance.weights(step)
        tokens, score = choose_tokens(
            self.logits,
            weights,
            temperature=choice.temperature * choice.softmax_temperature,
            top_k=choice.top_k,
            top_p=choice.top_p,
            **noise.token_noise(stream, step, self.logits.shape[1:]),
        )
        if choice.score == "logit":
            score = self._guided(tokens, guidance, weights) / choice.softmax_temperature
        return Draw(tokens, score, lambda targets: self._log_probs(targets, guidance, weights, choice))

    def _log_probs(self, targets: slice, guidance: Guidance, weights: Sequence[float], choice: TokenChoice) -> Tensor:
        """What the tokens of some targets were drawn from: [B, c, V], -inf for what the filters took away."""
        guided = guidance.mix(self.logits[:, :, targets], weights)
        if choice.temperature == 0:
            best = torch.full_like(guided, -math.inf)
            return best.scatter_(-1, guided.argmax(dim=-1, keepdim=True), 0.0)
        scores = rearrange(guided / (choice.temperature * choice.softmax_temperature), "b c v -> (b c) v")
        kept = keep_likeliest(scores, choice.top_k, choice.top_p)
        return rearrange(kept.log_softmax(dim=-1), "(b c) v -> b c v", b=guided.shape[0])

    def _guided(self, tokens: Tensor, guidance: Guidance, weights: Sequence[float]) -> Tensor:
        """The guided logit of every token [B, m]."""
        index = tokens[None, ..., None].expand(len(self.logits), -1, -1, -1)
        return guidance.mix(self.logits.gather(-1, index), weights)[..., 0]


@dataclass(frozen=True)
class Channels:
    """Tokens of C levels each, which a small network draws channel by channel (TokenBridge, arXiv 2503.16430).

    features: [R, B, m, D], one part per guidance row. sample(features [n, D], choose) -> levels [n, C] int64 asks
    choose(k, logits [n, V]) -> levels [n] for one channel after another, the k-th with noise of its own.
    """

    features: Tensor
    sample: Callable[[Tensor, Callable[[int, Tensor], Tensor]], Tensor]

    def draw(self, step: Step, guidance: Guidance, choice: TokenChoice, noise: Noise) -> Draw:
        """Guidance mixes the *features*, so the network runs once. Filters work per channel; the score is the channels' sum."""
        features = guidance.mix(self.features, guidance.weights(step)).to(self.features.dtype)
        batch, alone, scores = len(features), ClassifierFree(), []

        def choose(place: int, logits: Tensor) -> Tensor:
            part = Logits(rearrange(logits, "(b m) v -> 1 b m v", b=batch))
            drawn = part.draw(step, alone, choice, noise, CHANNELS + place)
            scores.append(drawn.score)
            return rearrange(drawn.values, "b m -> (b m)")

        levels = self.sample(rearrange(features, "b m d -> (b m) d"), choose)
        return Draw(rearrange(levels, "(b m) c -> b m c", b=batch), torch.stack(scores).sum(dim=0))


@dataclass(frozen=True)
class Diffusion:
    """Continuous tokens, each denoised on its own by a small network (MAR, arXiv 2406.11838; MaskGen-KL, Hi-MAR).

    features: [R, B, m, D], one part per guidance row. head(x [n, C], t [n] int64 timesteps of the training process,
    features [n, D]) -> [n, 2C]: the noise and the position of the variance in its range, or [n, C]: the noise alone.
    process: the training process; channels: C.
    """

    features: Tensor
    head: Callable[[Tensor, Tensor, Tensor], Tensor]
    process: GaussianDiffusion
    channels: int

    def draw(self, step: Step, guidance: Guidance, choice: DiffusionChoice | PhaseChoice, noise: Noise) -> Draw:
        """Denoises all targets at once from N(0, 1). Draws [B, m, C] fp32; there is no score."""
        _, batch, size, _ = self.features.shape
        choice, weights = choice.at(step), guidance.weights(step)

        def normal(stream: int) -> Tensor:
            drawn = noise.normal(DIFFUSION + stream, step, (batch, size, self.channels))
            return rearrange(drawn, "b m c -> (b m) c").to(self.features.device)

        values = solver(choice.solver)(
            lambda x, t: self.denoise(x, t, guidance, weights),
            self.process.respaced(choice.substeps, choice.clip),
            normal(0),
            lambda substep: normal(1 + substep),
            choice.temperature,
        )
        return Draw(rearrange(values, "(b m) c -> b m c", b=batch))

    def denoise(
        self, x: Tensor, t: Tensor, guidance: Guidance, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor | None]:
        """x [n, C], t [n] -> guided noise [n, C], and the variance's position [n, C] (None: the head has none).

        All guidance rows denoise the same x. Only the noise is guided: the variance is that of the conditional row.
        """
        rows = rows_needed(weights)
        z = rearrange(self.features[:rows], "r b m d -> (r b m) d")
        out = self.head(x.repeat(rows, 1).to(z.dtype), t.repeat(rows), z).float()
        parts = rearrange(out, "(r n) (k c) -> k r n c", r=rows, c=self.channels)
        return guidance.mix(parts[0], weights[:rows]), (parts[1][0] if len(parts) == 2 else None)


@dataclass(frozen=True)
class GridDiffusion:
    """A whole grid of continuous tokens that is denoised at once, around what is known of it (Hi-MAR, arXiv 2505.20288, section 3.3).

    features: [R, B, L, D] of all positions, one part per guidance row. tokens [B, L, C], masked [B, L] bool: what stands
    there, and where that means nothing. head(x [n, L, C], t [n] int64 timesteps of the training process, features
    [n, L, D]) -> the noise [n, L, C]; its variance is fixed. first: the canvas position of the grid's first token.
    """

    features: Tensor
    tokens: Tensor
    masked: Tensor
    head: Callable[[Tensor, Tensor, Tensor], Tensor]
    process: GaussianDiffusion
    first: int = 0

    def draw(self, step: Step, guidance: Guidance, choice: DiffusionChoice | PhaseChoice, noise: Noise) -> Draw:
        """Draws the targets [B, m, C] fp32; there is no score. What else is masked is denoised with them and dropped."""
        values = self.denoised(step, guidance, choice, noise)
        targets = (step.targets.to(values.device) - self.first).expand(len(values), step.size)
        return Draw(values.gather(1, targets[..., None].expand(-1, -1, values.shape[-1])))

    def denoised(self, step: Step, guidance: Guidance, choice: DiffusionChoice | PhaseChoice, noise: Noise) -> Tensor:
        """The grid [B, L, C] fp32; what is not masked means nothing in it."""
        choice, weights = choice.at(step), guidance.weights(step)
        process, tokens = self.process.respaced(choice.substeps, choice.clip), self.tokens.float()
        places = torch.arange(self.first, self.first + tokens.shape[1], device=step.targets.device)
        whole = replace(step, targets=places)  # noise belongs to positions, and every position gets some

        def normal(stream: int) -> Tensor:
            return noise.normal(DIFFUSION + stream, whole, tokens.shape).to(tokens.device)

        start = normal(0)

        def given(x: Tensor, substep: int) -> Tensor:
            # One noise for all substeps: known tokens move along a straight line, as released.
            return torch.where(self.masked[..., None], x, process.noised(tokens, substep, start))

        return solver(choice.solver)(
            lambda x, t: (self.noise(x, t, guidance, weights), None),
            process,
            start,
            lambda substep: normal(1 + substep),
            choice.temperature,
            given,
        )

    def noise(self, x: Tensor, t: Tensor, guidance: Guidance, weights: Sequence[float]) -> Tensor:
        """x [n, L, C], t [n] -> the guided noise [n, L, C]. All guidance rows see the same x."""
        rows = rows_needed(weights)
        z = rearrange(self.features[:rows], "r b l d -> (r b) l d")
        out = self.head(x.repeat(rows, 1, 1).to(z.dtype), t.repeat(rows), z).float()
        return guidance.mix(rearrange(out, "(r b) l c -> r b l c", r=rows), weights[:rows])


@dataclass(frozen=True)
class Flow:
    """Continuous tokens made by a flow x_t = t · noise + (1 - t) · data, time from 1 to 0 (xAR, Ming-UniVision).

    velocity(x [B, m, C], t) -> dx/dt [R, B, m, C], one part per guidance row, all of the same x. batch: B; channels: C.
    """

    velocity: Callable[[Tensor, float], Tensor]
    batch: int
    channels: int
    device: torch.device

    def draw(self, step: Step, guidance: Guidance, choice: FlowChoice, noise: Noise) -> Draw:
        """Integrates all targets at once from temperature x N(0, 1), guiding every velocity. [B, m, C] fp32, no score."""
        weights, shape = guidance.weights(step), (self.batch, step.size, self.channels)

        def normal(stream: int) -> Tensor:
            return noise.normal(DIFFUSION + stream, step, shape).to(self.device)

        values = flow_solver(choice.solver)(
            lambda x, t: guidance.mix(self.velocity(x, t), weights),
            normal(0) * choice.temperature,
            choice.substeps,
            choice.shift,
            lambda substep: normal(1 + substep),
        )
        return Draw(values)


@dataclass(frozen=True)
class MeanFlow:
    """Continuous tokens made by jumps along a flow's average velocities: a few substeps, or one (arXiv 2505.13447, 2507.16884).

    velocity(x [B, m, C], now, then) -> [R, B, m, C], the mean of dx/dt from time `now` down to `then`; the rest as in `Flow`.
    """

    velocity: Callable[[Tensor, float, float], Tensor]
    batch: int
    channels: int
    device: torch.device

    def draw(self, step: Step, guidance: Guidance, choice: FlowChoice, noise: Noise) -> Draw:
        """Jumps over `choice.substeps` intervals. There is only one way to jump: `choice.solver` must be "euler"."""
        if choice.solver != "euler":
            raise VgenError(f"average velocities are jumped along, so the solver is 'euler', got {choice.solver!r}")
        weights = guidance.weights(step)
        x = noise.normal(DIFFUSION, step, (self.batch, step.size, self.channels)).to(self.device) * choice.temperature
        for now, then in pairwise(shifted_times(even_times(choice.substeps), choice.shift)):
            x = x + (then - now) * guidance.mix(self.velocity(x, now, then), weights)
        return Draw(x)


def per_token(head: Callable[..., Tensor], features: Tensor) -> Callable[..., Tensor]:
    """The velocity of a network that works on single tokens.

    head(x [n, C], one or two times [n] …, features [n, D]) -> [n, C]; features [R, B, m, D]. The result takes x [B, m, C] and
    times as numbers, and gives [R, B, m, C] in fp32.
    """
    rows, batch, size, _ = features.shape
    z = rearrange(features, "r b m d -> (r b m) d")

    def velocity(x: Tensor, *times: float) -> Tensor:
        tokens = x.flatten(0, 1).repeat(rows, 1).to(z.dtype)
        out = head(tokens, *(torch.full((len(tokens),), t, device=z.device) for t in times), z)
        return rearrange(out.float(), "(r b m) c -> r b m c", r=rows, b=batch, m=size)

    return velocity


def rows_needed(weights: Sequence[float]) -> int:
    """Number of leading guidance rows up to the last that weighs anything: a costly network need not run on the others."""
    return max(row for row, weight in enumerate(weights, 1) if weight)
