"""The decode loop: the only loop over positions in the project."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vgen.samplers.types import Canvas, Guidance, Noise, Order, State, Step, TokenModel


@torch.no_grad()  # also what a Prediction draws: the graph of a few hundred substeps a call would fill the memory
def decode(
    model: TokenModel, state: State, canvas: Canvas, order: Order, guidance: Guidance, choice: Any, noise: Noise
) -> Iterator[tuple[Step, Canvas]]:
    """Fills the unknown positions of `canvas`, one step of `order` at a time, yielding after every step.

    A generator, so that progress bars, animations, streaming and early exit are up to the caller. If a family does not
    fit, the contracts in samplers/types.py are wrong: fix them, never add a second loop.
    """
    for step in order.steps(canvas):
        prediction = model.predict(state, step, canvas)
        draw = prediction.draw(step, guidance, choice, noise)
        canvas.write(step.targets, draw.values, order.keep(step, draw, canvas, noise), step.keep)
        model.commit(state, step, canvas)
        yield step, canvas
