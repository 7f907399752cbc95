"""What trains a FlexTok: flow matching under a random number of tokens, and alignment of features (arXiv 2502.13967, section 3).

Shapes: B batch, C latent channels, N registers, h' x w' patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vgen.errors import VgenError
from vgen.samplers.flow import noisy
from vgen.tokenizers_vis.flextok import FlexTok, token_counts

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


class AlignmentHead(nn.Module):
    """REPA's projection (arXiv 2410.06940): three linear layers with SiLU from the decoder's features to the teacher's."""

    def __init__(self, width: int, hidden: int, teacher: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher)
        )

    def forward(self, features: Tensor, teacher: Tensor) -> Tensor:
        """1 - cosine similarity, mean over the teacher's grid.

        features [B, h', w', D], resampled to the grid of teacher [B, h, w, T].
        """
        maps = rearrange(features, "b h w d -> b d h w").float()
        maps = F.interpolate(maps, size=teacher.shape[1:3], mode="bilinear", align_corners=False)
        made = self.layers(rearrange(maps, "b d h w -> b h w d"))
        return 1.0 - F.cosine_similarity(made.float(), teacher.float(), dim=-1).mean()


class Teacher(nn.Module):
    """Frozen features of a DINOv2 (the paper: its L size at 518 px, a 37x37 grid). Needs transformers (extra `text`)."""

    def __init__(self, name: str, size: int = 518):
        super().__init__()
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise VgenError(
                "the alignment teacher needs transformers, which is not installed: pip install 'vgen[text]'"
            ) from error
        self.model: Any = AutoModel.from_pretrained(name).eval().requires_grad_(False)
        self.size = size
        self.width: int = self.model.config.hidden_size
        patch = self.model.config.patch_size
        if size % patch:
            raise VgenError(f"the teacher's picture size must be a multiple of its patch {patch}, got {size}")
        self.side = size // patch
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # ImageNet's, as in DINOv2
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, h, w, T]."""
        pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        tokens = self.model(((pixels + 1) / 2 - self.mean) / self.std).last_hidden_state
        patches = tokens[:, -(self.side**2) :]  # behind the class token (and registers, where there are some)
        return rearrange(patches, "b (h w) t -> b h w t", h=self.side)


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
