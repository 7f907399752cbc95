"""Reconstruction losses of MingTok's release (the rest of its training is not published): between patches of pixels.

The released recipe is "L1-plain". Names are those of the release.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor

from vgen.errors import VgenError, nearest


def _absolute(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs()


def _squared(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square()


def _squared_normalised(prediction: Tensor, target: Tensor) -> Tensor:
    """The target patch has mean 0 and (unbiased) variance 1 (MAE, arXiv 2111.06377, section 3)."""
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return _squared(prediction, (target - mean) / (variance + 1e-6).sqrt())


def _absolute_rescaled(prediction: Tensor, target: Tensor) -> Tensor:
    """The prediction is stretched so that its extremes over the *whole batch* are -1 and 1."""
    low, high = prediction.aminmax()
    return _absolute((prediction - low) / (high - low) * 2 - 1, target)


def _absolute_tanh(prediction: Tensor, target: Tensor) -> Tensor:
    return _absolute(prediction.tanh(), target)


PATCH_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "L1-plain": _absolute,
    "L1": _absolute_rescaled,
    "L1-tanh": _absolute_tanh,
    "L2": _squared,
    "L2-normalised": _squared_normalised,
}


def patch_loss(prediction: Tensor, target: Tensor, kind: str = "L1-plain", visible: Tensor | None = None) -> Tensor:
    """Mean loss of patches [B, n, D]. visible: [B, n] bool, the patches that count (None: all)."""
    if kind not in PATCH_LOSSES:
        raise VgenError(f"unknown patch loss {kind!r}{nearest(kind, PATCH_LOSSES)}; losses: {', '.join(PATCH_LOSSES)}")
    losses = PATCH_LOSSES[kind](prediction.float(), target.float()).mean(dim=-1)
    return losses.mean() if visible is None else (losses * visible).sum() / visible.sum()


def visible_patches(masked: Tensor, height: int, ratio: int) -> Tensor:
    """A mask of the encoder's input [B, h w] (True: masked) -> the pixel patches that it left, [B, (h r) (w r)] bool."""
    grid = rearrange(~masked, "b (h w) -> b h w", h=height)
    return repeat(grid, "b h w -> b (h a w e)", a=ratio, e=ratio)
