"""What a model says about a step's positions, and how to draw from it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vgen.kernels.choose_tokens import choose_tokens
from vgen.samplers.choice import TokenChoice
from vgen.samplers.noise import TOKENS
from vgen.samplers.types import Draw, Guidance, Noise, Step


@dataclass(frozen=True)
class Logits:
    """Independent categorical distributions: logits [R, B, m, V], one part per guidance row."""

    logits: Tensor

    def draw(self, step: Step, guidance: Guidance, choice: TokenChoice, noise: Noise) -> Draw:
        """Mixes, filters and draws in one kernel. Draw.score is the log-probability of the drawn token before the filters."""
        tokens, score = choose_tokens(
            self.logits,
            guidance.weights(step),
            temperature=choice.temperature,
            top_k=choice.top_k,
            top_p=choice.top_p,
            **noise.token_noise(TOKENS, step, self.logits.shape[1:]),
        )
        return Draw(tokens, score)
