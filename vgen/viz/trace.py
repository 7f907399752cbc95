"""The picture appearing step by step: what was known after every step of a decode run, as an animation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vgen.layers.picture_files import save_animation
from vgen.samplers.types import Canvas, Step
from vgen.viz.sheets import sheet

BLANK = (226, 228, 232)  # cells that are not decoded yet


class Trace:
    """Collects the canvas of one batch after every step; pass it as `callback_on_step_end` and render it afterwards.

    limit: how many samples of the first batch are kept. Of a canvas with several levels it shows the one that is being decoded.
    """

    def __init__(self, limit: int = 16):
        self.limit = limit
        self.states: list[
            tuple[Tensor, int, Tensor]
        ] = []  # tokens of all levels, level from the end, known [B, T, H, W]
        self.closed = False

    def __call__(self, pipeline: Any, index: int, step: Step, values: dict[str, Any]) -> None:
        canvas: Canvas = values["canvas"]
        if step.index == 0:
            self.closed = bool(self.states)  # a second batch begins: the animation shows the first
        if not self.closed:
            level = min(step.phase, len(canvas.levels) - 1) - len(canvas.levels)
            part = canvas.part(level)
            known = part.known[: self.limit].cpu().clone().unflatten(1, part.grid)
            self.states.append((canvas.values[: self.limit].cpu().clone(), level, known))

    def frames(
        self,
        decode: Callable[..., list[Image.Image]],
        labels: Sequence[str] | None = None,
        scale: int = 2,
    ) -> list[Image.Image]:
        """One sheet a step. decode: tokens [B, N], level= -> B images; undecoded cells are blank, small levels enlarged."""
        pictures = [decode(values, level=level) for values, level, _ in self.states]
        size = pictures[-1][0].size
        return [
            sheet(
                [_blank(image.resize(size), mask[-1]) for image, mask in zip(images, known)],
                labels,
                scale=scale,
                title=f"step {index + 1} of {len(self.states)}",
            )
            for index, (images, (_, _, known)) in enumerate(zip(pictures, self.states))
        ]


def _blank(image: Image.Image, known: Tensor) -> Image.Image:
    """Paints the cells that are not known ([H, W] bool)."""
    mask = Image.fromarray((~known).to(torch.uint8).mul(255).numpy()).resize(image.size, Image.Resampling.NEAREST)
    image = image.copy()
    image.paste(BLANK, mask=mask)
    return image


def save_trace(frames: Sequence[Image.Image], path: str | Path, milliseconds: int = 180, hold: int = 2000) -> None:
    """Writes a .gif or .webp that rests `hold` milliseconds on its last frame. Raises VgenError for other suffixes."""
    save_animation(frames, path, [milliseconds] * (len(frames) - 1) + [hold])
