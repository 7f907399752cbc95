"""Noise that does not depend on the batch: Philox 4x32-10 keyed by (seed, sample), counted by (position, step, stream).

The same (seed, sample) gives the same numbers for any batch size, batch row, process count and device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.kernels.philox import philox_gumbel, philox_normal, philox_uniform
from vgen.samplers.types import Step
from vgen.values import whole

TOKENS, CONFIDENCE, START, ACCEPT, RESAMPLE = range(5)  # streams: independent numbers for the same position and step
DIFFUSION = 1 << 16  # the initial noise of a diffusion; its substep k has the stream DIFFUSION + 1 + k
LARGEST = 2**32 - 1  # seeds and picture numbers are words of Philox's key and counter
CHANNELS = 1 << 24  # tokens of several channels: the one that is drawn k-th has the stream CHANNELS + k


@dataclass(frozen=True)
class PhiloxNoise:
    """Counter-based noise (Salmon et al., SC'11). seed: 0 to 2^32 - 1; samples: [B] global sample indices."""

    seed: int
    samples: Tensor
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "seed", whole(self.seed, "the seed", 0, LARGEST))

    def _samples(self, device: torch.device) -> Tensor:
        """The samples on a device, copied there once: a copy in every substep would wait for it."""
        if device not in self._copies:
            self._copies[device] = self.samples.to(device)
        return self._copies[device]

    def token_noise(self, stream: int, step: Step, shape: Sequence[int]) -> dict[str, Any]:
        """The Philox key and counter: `choose_tokens` draws inside its kernel."""
        return {
            "seed": self.seed,
            "samples": self._samples(step.targets.device),
            "positions": step.targets,
            "step": step.index,
            "stream": stream,
        }

    def gumbel(self, stream: int, step: Step, shape: Sequence[int]) -> Tensor:
        """Gumbel(0, 1), fp32, shape [B, m, ...]."""
        return self._draw(philox_gumbel, stream, step, shape)

    def uniform(self, stream: int, step: Step, shape: Sequence[int]) -> Tensor:
        """U(0, 1), fp32, shape [B, m, ...]."""
        return self._draw(philox_uniform, stream, step, shape)

    def normal(self, stream: int, step: Step, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """N(0, 1), shape [B, m, ...]."""
        return self._draw(philox_normal, stream, step, shape).to(dtype)

    def picture(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """N(0, 1), fp32 [B, ...] for whole pictures: what a flow decoder starts from. It belongs to no position or step."""
        samples = self.samples.to(device)
        origin = torch.zeros(1, dtype=torch.long, device=device)
        return philox_normal(self.seed, samples, origin, 0, START, math.prod(shape[1:])).view(*shape)

    def _draw(self, kind: Callable[..., Tensor], stream: int, step: Step, shape: Sequence[int]) -> Tensor:
        samples = self._samples(step.targets.device)
        return kind(self.seed, samples, step.targets, step.index, stream, math.prod(shape[2:])).view(*shape)


@dataclass
class TapeNoise:
    """Replays recorded draws in the order in which they are asked for: parity with the original samplers.

    gumbels, uniforms, normals: lists of tensors; one is taken per call and must have the asked shape. A recorded
    Exp(1) draw q of `multinomial` is the Gumbel draw -log(q).
    """

    gumbels: list[Tensor]
    uniforms: list[Tensor]
    normals: list[Tensor]

    @classmethod
    def from_exponential(cls, draws: Sequence[Tensor]) -> TapeNoise:
        """A tape of torch.multinomial's exponential draws: argmax(p / q) = argmax(log p - log q)."""
        return cls([-torch.log(q) for q in draws], [], [])

    def token_noise(self, stream: int, step: Step, shape: Sequence[int]) -> dict[str, Any]:
        """The next recorded Gumbel tensor."""
        return {"gumbel": self._next(self.gumbels, step, shape)}

    def gumbel(self, stream: int, step: Step, shape: Sequence[int]) -> Tensor:
        """The next recorded Gumbel tensor."""
        return self._next(self.gumbels, step, shape)

    def uniform(self, stream: int, step: Step, shape: Sequence[int]) -> Tensor:
        """The next recorded uniform tensor."""
        return self._next(self.uniforms, step, shape)

    def normal(self, stream: int, step: Step, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """The next recorded normal tensor."""
        return self._next(self.normals, step, shape).to(dtype)

    def _next(self, tape: list[Tensor], step: Step, shape: Sequence[int]) -> Tensor:
        if not tape:
            raise VgenError("the recorded noise is used up: the run makes more draws than the recording")
        draw = self._of_targets(tape.pop(0), step)
        if draw.numel() != math.prod(shape):
            raise VgenError(f"the recorded noise has shape {tuple(draw.shape)}, the run asks for {tuple(shape)}")
        return draw.view(*shape)

    def _of_targets(self, draw: Tensor, step: Step) -> Tensor:
        return draw


class GridTape(TapeNoise):
    """A tape of draws [B, N, ...] over all positions, as the samplers of masked models make them: those of the targets count."""

    @classmethod
    def from_uniform(cls, draws: Sequence[Tensor]) -> GridTape:
        """A tape of the Gumbel noise that MaskGIT and MaskGen make of uniform numbers: both logarithms are kept above 1e-20."""
        tiny = 1e-20
        return cls([-torch.log((-torch.log(u.clamp_min(tiny))).clamp_min(tiny)) for u in draws], [], [])

    def _of_targets(self, draw: Tensor, step: Step) -> Tensor:
        targets = step.targets.to(draw.device).expand(len(draw), step.size)
        return draw[torch.arange(len(draw), device=draw.device)[:, None], targets]
