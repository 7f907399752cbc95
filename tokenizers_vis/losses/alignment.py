"""Alignment of a network's features with those of a frozen vision model (REPA, arXiv 2410.06940, section 3).

FlexTok aligns its decoder with DINOv2; MingTok predicts features of a vision model and of a text-aligned one where its
input is masked. Heads are not part of a saved tokenizer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vgen.errors import VgenError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of colours in [0, 1] that DINOv2 takes off
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # arXiv 2103.00020


class AlignmentHead(nn.Module):
    """REPA's projection: three linear layers with SiLU from a network's features to the teacher's."""

    def __init__(self, width: int, hidden: int, teacher: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher)
        )

    def forward(self, features: Tensor, teacher: Tensor, where: Tensor | None = None) -> Tensor:
        """1 - cosine similarity, mean over the teacher's grid, or over the places `where` [B, h, w] bool (0 without any).

        features [B, h', w', D], resampled to the grid of teacher [B, h, w, T].
        """
        maps = rearrange(features, "b h w d -> b d h w").float()
        maps = F.interpolate(maps, size=teacher.shape[1:3], mode="bilinear", align_corners=False)
        made = self.layers(rearrange(maps, "b d h w -> b h w d"))
        distance = 1.0 - F.cosine_similarity(made.float(), teacher.float(), dim=-1)
        return distance.mean() if where is None else (distance * where).sum() / where.sum().clamp_min(1)


class Teacher(nn.Module):
    """Frozen patch features of a vision transformer of transformers: DINOv2, or the vision tower of CLIP. Needs the extra `text`.

    name: repository or folder; size: side of the pictures it sees, of which a tower takes only its own.
    """

    def __init__(self, name: str, size: int = 518):
        super().__init__()
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise VgenError(
                "the alignment teacher needs transformers, which is not installed: pip install 'vgen[text]'"
            ) from error
        try:
            whole: Any = AutoModel.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise VgenError(
                f"the teacher {name} cannot be loaded: it is no folder with a model of transformers, and no such name was found"
            ) from error
        tower = hasattr(whole, "vision_model")
        self.model: Any = (whole.vision_model if tower else whole).eval().requires_grad_(False)
        settings = self.model.config
        if size % settings.patch_size:
            raise VgenError(
                f"the teacher's picture size must be a multiple of its patch {settings.patch_size}, got {size}"
            )
        if tower and size != settings.image_size:
            raise VgenError(f"the teacher {name} takes pictures of {settings.image_size} pixels a side, got {size}")
        self.size, self.side, self.width = size, size // settings.patch_size, settings.hidden_size
        mean, std = CLIP if tower else IMAGENET
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, h, w, T]."""
        pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        tokens = self.model(((pixels + 1) / 2 - self.mean) / self.std).last_hidden_state
        patches = tokens[:, -(self.side**2) :]  # behind the class token (and registers, where there are some)
        return rearrange(patches, "b (h w) t -> b h w t", h=self.side)
