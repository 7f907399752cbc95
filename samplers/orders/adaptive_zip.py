"""Adaptive ZipAR: a row starts when the model is sure of its first token (arXiv 2412.04062; the variant was not released).

The paper's rule, as far as two summaries of it give it: once row i holds `window` tokens, the first token of row i + 1 is
proposed; in every following call, which knows one more token of row i, it is accepted with probability
min(1, p_now(x) / p_before(x)) and else drawn again from the normalised max(0, p_now - p_before), as in speculative
decoding, until a call accepts it or row i is complete. What is ours: the token fed in place of the missing end of row i
(`Feeding`), a fresh draw once row i is complete, and that a batch is one picture, because rows start when *it* is ready.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.noise import ACCEPT, RESAMPLE
from vgen.samplers.orders.base import BaseOrder, Call, OrderStep, on_device
from vgen.samplers.orders.nexttoken import Feeding
from vgen.samplers.types import Canvas, Draw, Grid, Noise, grid_size


@dataclass
class Proposal:
    """The first token of the next row while it is not confirmed. Values and what they were drawn from: [1], [1, V]."""

    position: int
    value: Tensor | None = None
    log_probs: Tensor | None = None
    accepted: bool = False

    def consider(self, drawn: Tensor, log_probs: Tensor, uniform: Tensor, gumbel: Tensor) -> None:
        """One call's verdict. drawn [1]: a draw from exp(log_probs [1, V]); uniform [1]; gumbel [1, V]."""
        if self.log_probs is None:
            self.value, self.log_probs = drawn, log_probs
            return
        before, now = (part.gather(1, self.value[:, None])[:, 0] for part in (self.log_probs, log_probs))
        accepted = uniform < (now - before).exp()
        # Where nothing is left over, p_now is p_before and the token was accepted.
        rest = (log_probs.exp() - self.log_probs.exp()).clamp_min(0)
        again = (rest.log() + gumbel).argmax(dim=1)
        self.value = torch.where(accepted, self.value, again)
        self.log_probs = log_probs
        self.accepted = bool(accepted)  # waits for the device: how many tokens the next call has depends on it


@dataclass(frozen=True)
class ProposingStep(OrderStep):
    """A step whose last target is only proposed."""

    proposal: Proposal | None = None


class AdaptiveZip(BaseOrder):
    """Rows side by side; how many calls a picture takes, the model decides: from W + (H - 1) (window + 1) to H * W.

    `calls` is the upper bound. Pictures on an empty canvas, one at a time.
    """

    varies = "chosen by the model"

    def __init__(self, grid: Grid, window: int):
        if grid[0] > 1:
            raise VgenError(f"adaptive zip is defined for pictures, got {grid[0]} frames; use zip without it")
        super().__init__(f"zip:window={window},adaptive=true", grid, grid_size(grid))
        self.window = window

    def sequence(self, generator: torch.Generator | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """Raster, the surrogate: what is decoded together depends on the model."""
        return torch.arange(grid_size(self.grid)), (1,) * grid_size(self.grid)

    def plan(self, canvas: Canvas) -> list[Call]:
        """Never asked for: the calls follow from the draws."""
        raise VgenError(f"order {self.name!r} cannot be planned before it is decoded")

    def steps(self, canvas: Canvas) -> Iterator[OrderStep]:
        """See the module docstring. Raises VgenError for a batch or a partly known canvas."""
        if self.known_mask(canvas) is not None or canvas.batch > 1:
            raise VgenError(
                f"order {self.name!r} starts rows when the picture at hand is ready: it needs an empty canvas and one picture "
                "a batch (batch_size 1)"
            )
        _, height, width = self.grid
        total, device = grid_size(self.grid), canvas.values.device
        feeding, held, started, index = Feeding(self.grid, None), [0] * height, 1, 0
        proposal: Proposal | None = None
        while (done := sum(held)) < total:
            above = held[started - 1]  # tokens of the last row that has started
            if started < height and above == width:
                started, proposal = started + 1, None  # the row above is complete: an ordinary draw
            elif started < height and above >= self.window and proposal is None:
                proposal = Proposal(started * width)
            rows = [row for row in range(started) if held[row] < width]
            targets = [row * width + held[row] for row in rows]
            asked = targets + ([proposal.position] if proposal else [])
            yield ProposingStep(
                index=index,
                targets=torch.tensor(asked, device=device),
                keep=len(targets),
                unknown=(total - done, total - done - len(targets)),
                total=self.calls,
                start_unknown=total,
                feed=on_device([feeding.next(asked)], device)[0],
                closes=done + len(targets) == total,
                ratio=(done + len(targets)) / total,
                proposal=proposal,
            )
            index += 1
            feeding.write(targets)
            for row in rows:
                held[row] += 1
            if proposal and proposal.accepted:
                position = torch.full((1, 1), proposal.position, device=device)
                fresh = canvas.fresh
                canvas.write(position, proposal.value[:, None], None, 1)
                canvas.fresh = torch.cat((fresh, position), dim=1)
                feeding.write([proposal.position])
                held[started], started, proposal = 1, started + 1, None

    def keep(self, step: ProposingStep, draw: Draw, canvas: Canvas, noise: Noise) -> Tensor | None:
        """[1, m] bool: everything but the proposal, which is weighed here."""
        if step.proposal is None:
            return None
        if draw.log_probs is None:
            raise VgenError("adaptive zip weighs distributions of tokens, this model's predictions have none; use zip")
        log_probs = draw.log_probs(slice(step.size - 1, step.size))[:, 0]
        uniform = noise.uniform(ACCEPT, step, (1, step.size))[:, -1]
        gumbel = noise.gumbel(RESAMPLE, step, (1, step.size, log_probs.shape[-1]))[:, -1]
        step.proposal.consider(draw.values[:, -1], log_probs, uniform, gumbel)
        return torch.arange(step.size, device=draw.values.device)[None] < step.keep
