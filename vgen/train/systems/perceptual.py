"""The perceptual distance of a training objective, as settings: which one, its weight and its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vgen.settings import require, require_choice, require_not_negative
from vgen.tokenizers_vis.losses.perceptual import LPIPS, ConvNeXtDistance, PyramidLoss, WeightedMean

# perceptual distance -> fields of PerceptualConfig with the files that it needs
PERCEPTUAL = {
    "pyramid": (),
    "lpips": ("lpips_vgg", "lpips_heads"),
    "convnext": ("convnext",),
    "lpips-convnext": ("lpips_vgg", "lpips_heads", "convnext"),
    "none": (),
}


@dataclass(frozen=True)
class PerceptualConfig:
    """perceptual: `lpips` and `convnext` need their files; lpips-convnext is TiTok's mean of both, with convnext_share for one
    part of LPIPS; `pyramid` is the substitute for machines without those files.
    """

    perceptual: str = "pyramid"
    perceptual_weight: float = 1.0
    lpips_vgg: str | None = None
    lpips_heads: str | None = None
    convnext: str | None = None
    convnext_share: float = 0.1


def check_perceptual(loss: PerceptualConfig, size: int) -> None:
    """Raises VgenError for settings that cannot work. size: side of the pictures in pixels."""
    require_choice("loss.perceptual", loss.perceptual, PERCEPTUAL)
    require_not_negative(loss, "perceptual_weight", "convnext_share", prefix="loss.")
    for name in PERCEPTUAL[loss.perceptual]:
        path = getattr(loss, name)
        require(
            bool(path) and Path(path).is_file(),
            f"loss.perceptual={loss.perceptual} needs the file loss.{name}, found {path}",
        )
    least = 8 * 2**2
    require(
        loss.perceptual != "pyramid" or size >= least,
        f"loss.perceptual=pyramid needs data.size >= {least}, found {size}",
    )


def make_perceptual(loss: PerceptualConfig) -> nn.Module | None:
    """The distance between two batches of pictures -> [B, 1, 1, 1]; None for `none`."""
    made = {
        "pyramid": PyramidLoss,
        "lpips": lambda: LPIPS.from_files(loss.lpips_vgg, loss.lpips_heads),
        "convnext": lambda: ConvNeXtDistance.from_file(loss.convnext),
    }
    parts = [made[name]() for name in loss.perceptual.split("-") if name in made]
    return WeightedMean(parts, (1.0, loss.convnext_share)) if len(parts) > 1 else next(iter(parts), None)
