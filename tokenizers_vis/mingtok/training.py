"""What trains a MingTok: masked image modelling with three objectives (arXiv 2510.06590).

    latents   where the input is masked, a head predicts the features of a vision model (DINOv2) from the latents
    features  there, too, another head predicts those of a text-aligned model (CLIP) from the semantic features
    pixels    pictures are rebuilt from whole and from masked inputs

The paper says no more, and its code is not public but for the reconstruction loss: how much is masked, how the terms are weighted
and what the heads look like is ours. Mask token and heads are not part of the saved tokenizer.

Shapes: B batch, h x w the grid of N latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from vgen.tokenizers_vis.losses.alignment import AlignmentHead
from vgen.tokenizers_vis.mingtok.losses import patch_loss, visible_patches
from vgen.tokenizers_vis.mingtok.mingtok import MingTok, MingTokOutput
from vgen.tokenizers_vis.mingtok.nets import Hidden, patchify, unpatchify


def draw_mask(uniform: Tensor, order: Tensor, share: float, ratio: float) -> Tensor:
    """[B, N] bool, True where masked: in a `share` of the pictures, `ratio` of their patches.

    uniform [B]: draws of U(0, 1) that say which pictures; order [B, N]: permutations that say which patches.
    """
    count = round(ratio * order.shape[1])
    return (order < count) & (uniform < share)[:, None]


@dataclass(frozen=True)
class TeacherTerm:
    """A frozen model's features as a target: their width, the weight of the term, and the width of the head that predicts them."""

    width: int
    weight: float
    hidden: int


class MingTokObjective(nn.Module):
    """The model and its three objectives as one loss.

    reconstruction: a name of `PATCH_LOSSES`; masks: whether inputs are masked at all; latent_term, semantic_term: of the
    teachers (None: no such term).
    """

    def __init__(
        self,
        model: MingTok,
        *,
        reconstruction: str = "L1-plain",
        masks: bool = False,
        latent_term: TeacherTerm | None = None,
        semantic_term: TeacherTerm | None = None,
    ):
        super().__init__()
        self.model, self.reconstruction = model, reconstruction
        width = model.config.encoder_width
        self.mask_token = nn.Parameter(0.02 * torch.randn(width)) if masks else None
        self.terms = {"latent": latent_term, "semantic": semantic_term}
        widths = {"latent": model.config.latent_channels, "semantic": model.config.semantic_width}
        self.heads = nn.ModuleDict(
            {
                name: AlignmentHead(widths[name], term.hidden, term.width)
                for name, term in self.terms.items()
                if term is not None
            }
        )

    def forward(
        self, pixels: Tensor, masked: Tensor | None = None, teachers: dict[str, Tensor] | None = None
    ) -> tuple[MingTokOutput, dict[str, Tensor]]:
        """pixels [B, 3, H, W] in [-1, 1], masked [B, N] bool (None: nothing is), teachers: "latent" and "semantic" features
        [B, h', w', T] where there are such terms -> the output, and "loss" to differentiate with its terms detached.

        As in the release, masked patches do not count in the reconstruction; only they count for the teachers.
        """
        model = self.model
        hidden = None if masked is None else Hidden(masked, self.mask_token)
        output = model(pixels, hidden)
        grid = model.spec.grid(*pixels.shape[-2:])
        made, target = (patchify(x, model.config.pixel_patch_size) for x in (output.reconstruction, pixels))
        visible = None if masked is None else visible_patches(masked, grid[1], model.ratio)
        loss = patch_loss(made, target, self.reconstruction, visible)
        terms = {"reconstruction": loss.detach()}
        sources = {"latent": output.latents, "semantic": output.features}
        for name, head in self.heads.items():
            features = rearrange(sources[name][:, :-1], "b (h w) c -> b h w c", h=grid[1])
            where = rearrange(masked, "b (h w) -> b h w", h=grid[1])
            distance = head(features, _at_grid(teachers[name], grid), where)
            loss = loss + self.terms[name].weight * distance
            terms[f"{name}_teacher"] = distance.detach()
        return output, {"loss": loss, **terms}


def paste_hidden(reconstruction: Tensor, pixels: Tensor, masked: Tensor | None, patch_size: int) -> Tensor:
    """The reconstruction with the original where the input was masked, for distances between pictures.

    reconstruction, pixels [B, 3, H, W]; masked [B, N] bool over patches of patch_size pixels a side (None: nothing is).
    """
    if masked is None:
        return reconstruction
    made, real = (patchify(x, patch_size) for x in (reconstruction, pixels))
    return unpatchify(torch.where(masked[..., None], real, made), pixels.shape[2] // patch_size, patch_size)


def _at_grid(teacher: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Teacher's features [B, h', w', T] on the grid of the latents [B, h, w, T]."""
    maps = rearrange(teacher, "b h w t -> b t h w").float()
    maps = nn.functional.interpolate(maps, size=grid[1:], mode="bilinear", align_corners=False, antialias=True)
    return rearrange(maps, "b t h w -> b h w t")
