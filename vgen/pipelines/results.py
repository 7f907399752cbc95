"""What comes out of a pipeline: finished batches, all pictures of a call, and what they cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from vgen.samplers.types import Condition, Counters

Images: TypeAlias = list[Image.Image] | np.ndarray | Tensor  # by `output_type`: see OUTPUTS of vgen/pipelines/calls.py


@dataclass
class Stats:
    """Cost of a run: forward passes of the backbone (calls) per batch, calls x rows, tokens fed, and the clock."""

    images: int = 0
    batches: int = 0
    calls: int = 0
    call_rows: int = 0
    fed_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, batch: Batch) -> None:
        """One finished batch."""
        self.images += len(batch.numbers)
        self.batches += 1
        self.calls += batch.counters.calls
        self.call_rows += batch.counters.call_rows
        self.fed_tokens += batch.counters.fed_tokens
        self.tokens += batch.tokens.shape[0] * batch.tokens.shape[1]

    def report(self) -> dict[str, Any]:
        """Everything, with the rates people ask for."""
        seconds = max(self.seconds, 1e-9)
        return {
            **asdict(self),
            "calls_per_batch": self.calls / max(self.batches, 1),
            "images_per_second": self.images / seconds,
            "tokens_per_second": self.tokens / seconds,
        }


@dataclass
class VisualOutput(BaseOutput):
    """images: as `output_type` says; tokens: [M, N] int64, or [M, N, C] floats; stats: cost of the run."""

    images: Images
    tokens: Tensor
    stats: Stats


@dataclass(frozen=True)
class Batch:
    """Pictures that were decoded together and are finished: numbers [B] of the run, tokens [B, N] or [B, N, C], what they were
    made for (condition), and the cost of the batch."""

    numbers: list[int]
    images: Images
    tokens: Tensor
    condition: Condition
    counters: Counters
