"""What trains a FlexTok: flow matching under a random number of tokens, and alignment of features (arXiv 2502.13967, section 3).

Shapes: B batch, C latent channels, N registers, h' x w' patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgen.samplers.flow import noisy
from vgen.tokenizers_vis.flextok.flextok import FlexTok, token_counts
from vgen.tokenizers_vis.losses.alignment import AlignmentHead

TAP = 1  # the decoder block whose features are aligned


def _one_of_powers(uniform: Tensor, count: int) -> Tensor:
    powers = torch.tensor(token_counts(count), device=uniform.device)
    return powers[(uniform * len(powers)).long()]


def _any_count(uniform: Tensor, count: int) -> Tensor:
    return (uniform * count).long() + 1


def _next_power(uniform: Tensor, count: int) -> Tensor:
    powers = torch.tensor(token_counts(count), device=uniform.device)
    return powers[torch.searchsorted(powers, _any_count(uniform, count))]


# Numbers of kept tokens from U[0, 1) draws [B]: each power of two as often as any other (published), each number as often
# as any other, or the latter rounded up to a power of two.
KEEP: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pow2": _one_of_powers,
    "uniform": _any_count,
    "uniform_pow2": _next_power,
}


class FlexTokObjective(nn.Module):
    """Encoder, quantizer and decoder of a FlexTok as one loss; the VAE stays outside, it is not trained.

    teacher_width: of the teacher's features (None: no alignment); alignment_weight, alignment_hidden: of the term and
    of its head, which is not part of the saved tokenizer.
    """

    def __init__(
        self,
        model: FlexTok,
        teacher_width: int | None = None,
        alignment_weight: float = 1.0,
        alignment_hidden: int = 2048,
    ):
        super().__init__()
        self.encoder, self.decoder, self.quantizer = model.encoder, model.decoder, model.quantizer
        self.alignment_weight = alignment_weight
        self.alignment: AlignmentHead | None = None
        if teacher_width is not None:
            self.alignment = AlignmentHead(model.config.decoder_width, alignment_hidden, teacher_width)

    def forward(
        self, latents: Tensor, noise: Tensor, times: Tensor, keep: Tensor, drop: Tensor, teacher: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Scaled latent maps and noise [B, C, h, w], times [B], numbers of kept tokens [B], samples without condition [B]
        bool, teacher's features [B, h, w, T] -> "loss" to differentiate, its terms detached, and "tokens" [B, N].

        The flow term is the mean squared error of the velocity noise - latents.
        """
        codes, tokens = self.quantizer.quantize(self.encoder(latents))
        registers = self.decoder.registers(codes, keep, drop)
        velocity, features = self.decoder(noisy(latents, noise, times), times, registers, TAP)
        flow = F.mse_loss(velocity.float(), noise - latents)
        terms = {"loss": flow, "flow": flow.detach(), "tokens": tokens}
        if self.alignment is not None:
            aligned = self.alignment(features, teacher)
            terms |= {"loss": flow + self.alignment_weight * aligned, "alignment": aligned.detach()}
        return terms
