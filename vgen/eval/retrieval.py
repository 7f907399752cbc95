"""Does a generated picture look like the one its caption belongs to?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from vgen.errors import VgenError
from vgen.layers.pixels import to_pixels


def pixel_features(images: Sequence[Image.Image]) -> Tensor:
    """RGB values in [-1, 1] as one row per picture: [M, 3 * H * W]. Distances between rows are pixel distances."""
    return torch.stack([to_pixels(image).flatten() for image in images])


def nearest_pictures(generated: Tensor, gallery: Tensor) -> Tensor:
    """Index of the gallery row with the least Euclidean distance to each generated row: [M] int64."""
    if generated.shape[1] != gallery.shape[1]:
        raise VgenError(
            f"generated pictures have {generated.shape[1]} values each, the gallery {gallery.shape[1]}; use one picture size"
        )
    return torch.cdist(generated, gallery).argmin(dim=1)


def retrieval_share(generated: Tensor, gallery: Tensor, answers: Tensor) -> float:
    """Share of generated rows [M, D] whose nearest gallery row [G, D] is `answers` [M]. Chance is 1 / G."""
    return (nearest_pictures(generated, gallery) == answers).float().mean().item()
