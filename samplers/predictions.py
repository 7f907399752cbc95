"""What a model says about a step's positions, and how to draw from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from vgen.kernels.choose_tokens import choose_tokens, keep_likeliest
from vgen.samplers.choice import DiffusionChoice, TokenChoice
from vgen.samplers.diffusion import GaussianDiffusion, solver
from vgen.samplers.noise import DIFFUSION, TOKENS
from vgen.samplers.types import Draw, Guidance, Noise, Step


@dataclass(frozen=True)
class Logits:
    """Independent categorical distributions: logits [R, B, m, V], one part per guidance row."""

    logits: Tensor

    def draw(self, step: Step, guidance: Guidance, choice: TokenChoice, noise: Noise) -> Draw:
        """Mixes, filters and draws in one kernel. Draw.score is what `choice.score` says, before the filters."""
        choice, weights = choice.at(step), guidance.weights(step)
        tokens, score = choose_tokens(
            self.logits,
            weights,
            temperature=choice.temperature * choice.softmax_temperature,
            top_k=choice.top_k,
            top_p=choice.top_p,
            **noise.token_noise(TOKENS, step, self.logits.shape[1:]),
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

    def draw(self, step: Step, guidance: Guidance, choice: DiffusionChoice, noise: Noise) -> Draw:
        """Denoises all targets at once from N(0, 1). Draws [B, m, C] fp32; there is no score."""
        _, batch, size, _ = self.features.shape
        weights = guidance.weights(step)

        def normal(stream: int) -> Tensor:
            drawn = noise.normal(DIFFUSION + stream, step, (batch, size, self.channels))
            return rearrange(drawn, "b m c -> (b m) c").to(self.features.device)

        values = solver(choice.solver)(
            lambda x, t: self.denoise(x, t, guidance, weights),
            self.process.respaced(choice.substeps),
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
        rows = len(self.features)
        z = rearrange(self.features, "r b m d -> (r b m) d")
        out = self.head(x.repeat(rows, 1).to(z.dtype), t.repeat(rows), z).float()
        parts = rearrange(out, "(r n) (k c) -> k r n c", r=rows, c=self.channels)
        return guidance.mix(parts[0], weights), (parts[1][0] if len(parts) == 2 else None)
