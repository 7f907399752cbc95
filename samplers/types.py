"""The contracts of decoding: Grid, Step, Order, Canvas, Draw, Prediction, State, TokenModel.

The separation of concerns (docs/architecture.md): an Order knows positions, a model maps positions to sequence slots, a
Prediction knows how to draw, the Canvas knows what has been decoded, and `decode` (samplers/decode.py) is the only loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.values import several, whole

Grid = tuple[int, int, int]  # (T, H, W); an image has T = 1, a 1-D token sequence is (1, 1, N)


def as_grid(shape: int | Sequence[int]) -> Grid:
    """`N` -> (1, 1, N); `(H, W)` -> (1, H, W); `(T, H, W)` unchanged. Raises VgenError for anything else."""
    listed = several(shape, "a grid") if isinstance(shape, Iterable) and getattr(shape, "ndim", 1) else [shape]
    if len(listed) > 3:
        raise VgenError(f"a grid is N, HxW or TxHxW, got {len(listed)} sizes")
    sizes = tuple(whole(size, "a size of a grid (N, HxW or TxHxW)", 1) for size in listed)
    return (1,) * (3 - len(sizes)) + sizes  # type: ignore[return-value]


def grid_size(grid: Grid) -> int:
    """Number of positions T*H*W."""
    return grid[0] * grid[1] * grid[2]


def grid_coordinates(grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """(frame, row, column) of every raster position: [N, 3] int64."""
    position = torch.arange(grid_size(grid), device=device)
    return torch.stack((position // (grid[1] * grid[2]), position // grid[2] % grid[1], position % grid[2]), dim=-1)


@dataclass(frozen=True)
class Feed:
    """What a next-token model (LlamaGen) is fed in this step; models that ask for positions directly ignore it.

    The value of position `source[i]` enters at position `slot[i]` (-1: the condition, always and only the first entry of the first step);
    `reads[j]` is the row of the fed tokens whose output answers `targets[j]`. source != slot: a substitute for a token that is not decoded
    yet (ZipAR). All [f] resp. [m] int64. blanks: positions that were never fed are visible as zero keys and values, as in ZipAR's release.
    """

    source: Tensor
    slot: Tensor
    reads: Tensor
    blanks: bool = False


@dataclass(frozen=True)
class Step:
    """One pass of the decode loop. Counts are host integers, positions are tensors: the loop never calls `.item()`."""

    index: int  # 0-based over the whole run
    targets: Tensor  # [m] or [B, m] int64 positions to predict
    keep: int  # how many of the targets stay (confidence orders: < m; else m)
    unknown: tuple[int, int]  # unknown positions (before, after) this step, within the phase, per sample
    total: int  # calls of the whole run
    start_unknown: int  # unknown positions per sample when the phase began: the base of schedules
    phase: int = 0  # selects guidance, choice and solver (PAR and Hi-MAR have two)
    feed: Feed | None = None  # orders that next-token models can follow: what these are fed
    closes: bool = False  # a frame or picture is complete: commit() may run the network

    @property
    def size(self) -> int:
        """Number of predicted positions per sample (m)."""
        return self.targets.shape[-1]

    @property
    def progress(self) -> float:
        """Share of the run's calls finished after this step, in (0, 1]."""
        return (self.index + 1) / self.total


class Canvas:
    """What has been decoded: values over one or more grids (levels), and which of them are known.

    values: [B, N] int64 codes or [B, N, C] floats, levels concatenated in order. known: [B, N] bool; may start non-empty
    (inpainting, image-to-video). `fresh` holds the positions [B, k] of the latest write that stayed: the next step's input.
    samples: [B] int64 on the CPU, the global index of every sample: orders and noise are keyed by it, never by the batch row.
    """

    def __init__(
        self, levels: Sequence[Grid], values: Tensor, known: Tensor | None = None, samples: Tensor | None = None
    ):
        self.levels = tuple(levels)
        length = sum(map(grid_size, self.levels))
        if values.shape[1] != length:
            raise VgenError(f"a canvas over {self.levels} holds {length} values a sample, got {values.shape[1]}")
        self.values = values
        self.known = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device) if known is None else known
        self.samples = torch.arange(values.shape[0]) if samples is None else samples.cpu()
        self.fresh: Tensor | None = None

    @classmethod
    def blank(
        cls,
        grid: Grid | Sequence[Grid],
        samples: int | Tensor,
        device: torch.device | str = "cpu",
        channels: int | None = None,
        codes: bool | None = None,
    ) -> Canvas:
        """An empty canvas of zeros, [B, N] or [B, N, channels]. samples: B, or the [B] global sample indices.

        grid: one, or those of several levels; codes: int64 instead of float32; None: where there are no channels.
        """
        samples = torch.arange(samples) if isinstance(samples, int) else samples
        levels = (grid,) if isinstance(grid[0], int) else tuple(grid)
        length = sum(map(grid_size, levels))
        shape = (len(samples), length) if channels is None else (len(samples), length, channels)
        codes = channels is None if codes is None else codes
        dtype = torch.long if codes else torch.float32
        return cls(levels, torch.zeros(shape, dtype=dtype, device=device), samples=samples)

    @property
    def grid(self) -> Grid:
        """The grid of a canvas with one level, the finest of several."""
        return self.levels[-1]

    @property
    def batch(self) -> int:
        """Number of samples B."""
        return self.values.shape[0]

    def part(self, level: int) -> Canvas:
        """The canvas of one level: views, so that it shows what the loop writes here."""
        first = sum(map(grid_size, self.levels[:level]))
        places = slice(first, first + grid_size(self.levels[level]))
        return Canvas((self.levels[level],), self.values[:, places], self.known[:, places], self.samples)

    def unknown_count(self) -> int:
        """Unknown positions per sample; every sample must have equally many (one synchronisation, before the loop)."""
        counts = (~self.known).sum(dim=1)
        if counts.min() != counts.max():
            raise VgenError(
                f"every sample of a batch must have equally many unknown positions, found {int(counts.min())} to {int(counts.max())}; "
                "split the batch by mask"
            )
        return int(counts[0])

    def write(self, positions: Tensor, values: Tensor, keep: Tensor | None, count: int) -> None:
        """Stores `values` [B, m(, C)] at `positions` [m] or [B, m]; where `keep` [B, m] is False the old value stays.

        count: how many of the m stay in every sample (a host integer: keeps the loop free of synchronisation).
        """
        positions = positions.expand(self.batch, -1) if positions.dim() == 1 else positions
        if keep is not None and count < positions.shape[1]:
            chosen = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)[
                :, :count
            ]  # kept ones, in target order
            positions = positions.gather(1, chosen)
            values = values.gather(
                1, chosen if values.dim() == 2 else chosen[..., None].expand(-1, -1, values.shape[-1])
            )
        self.values.scatter_(1, positions if values.dim() == 2 else positions[..., None].expand_as(values), values)
        self.known.scatter_(1, positions, True)
        self.fresh = positions


@dataclass
class Draw:
    """Values drawn for a step's targets: [B, m] or [B, m, C]; score [B, m]: the family's confidence (None if it has none).

    log_probs: for orders that weigh one draw against another, the distribution [B, c, V] that the values of a slice of the
    targets were drawn from, computed when it is asked for (None: the family has no such distribution).
    """

    values: Tensor
    score: Tensor | None = None
    log_probs: Callable[[slice], Tensor] | None = None


class Order(Protocol):
    """Which positions are decoded when. `calls` is the number of forward passes on an empty canvas."""

    name: str
    grid: Grid
    calls: int

    def steps(self, canvas: Canvas) -> Iterator[Step]:
        """Yields the steps for the unknown positions of `canvas`; adaptive orders look at it between steps."""

    def keep(self, step: Step, draw: Draw, canvas: Canvas, noise: Noise) -> Tensor | None:
        """[B, m] bool: which targets stay; None: all. Confidence orders add annealed Gumbel noise to draw.score."""


class Noise(Protocol):
    """Every random draw of sampling. `stream` separates uses, `step` carries the index and the positions."""

    def token_noise(self, stream: int, step: Step, shape: Sequence[int]) -> dict[str, Any]:
        """The noise arguments of `choose_tokens` for logits [B, m, V]: a Philox key and counter, or a recorded `gumbel`.

        Gumbel noise is the only token noise: argmax(logits + gumbel) is a draw from softmax(logits).
        """

    def gumbel(self, stream: int, step: Step, shape: Sequence[int]) -> Tensor:
        """Gumbel(0, 1) noise [B, m, ...]."""

    def normal(self, stream: int, step: Step, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """N(0, 1) noise [B, m, C]."""

    def uniform(self, stream: int, step: Step, shape: Sequence[int]) -> Tensor:
        """U(0, 1) noise [B, m, ...], never exactly 0 or 1."""


class Guidance(Protocol):
    """How the guidance rows of a batch are mixed. rows: names of the conditions, 'cond' first."""

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the conditions."""

    def weights(self, step: Step) -> tuple[float, ...]:
        """One weight per row; the mixed prediction is their weighted sum unless `mix` says otherwise."""

    def mix(self, parts: Tensor, weights: Sequence[float]) -> Tensor:
        """[R, ...] -> [...], in fp32."""


class Prediction(Protocol):
    """What a model says about a step's targets, and how to draw from it (logits, channels, diffusion, flow)."""

    def draw(self, step: Step, guidance: Guidance, choice: Any, noise: Noise) -> Draw:
        """The family mixes where it must: logits, features, eps or velocity."""


@dataclass
class Counters:
    """Cost of a run: calls of the backbone, calls x rows, and tokens fed into it."""

    calls: int = 0
    call_rows: int = 0
    fed_tokens: int = 0

    def add(self, rows: int, tokens_per_row: int) -> None:
        """One backbone call over `rows` rows of `tokens_per_row` tokens."""
        self.calls += 1
        self.call_rows += rows
        self.fed_tokens += rows * tokens_per_row


class State(Protocol):
    """A model's memory of one run (cache, pivots, features); opaque to samplers."""

    counters: Counters


@dataclass(frozen=True)
class Condition:
    """The conditions of one guidance row for a whole batch.

    ids: [B, P] int64 prefix tokens (class and/or text; [B, 0] where the prefix is features only), mask: [B, P] bool, False on padding.
    extras: what is not ids, e.g. {"features": [B, P, C]} of a text encoder.
    """

    ids: Tensor
    mask: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def take(self, index: Tensor) -> Condition:
        """The condition of the given samples [M] int64."""
        extras = {name: value[index] for name, value in self.extras.items()}
        return Condition(self.ids[index], self.mask[index], extras)


class TokenModel(Protocol):
    """A generator. `predict` = plan (host) + run (device, static shapes)."""

    def start(self, conditions: Sequence[Condition], canvas: Canvas) -> State:
        """Runs the prefix (and the known part of the canvas); one Condition per guidance row."""

    def predict(self, state: State, step: Step, canvas: Canvas) -> Prediction:
        """One forward pass; parts stacked [R, B, m, ...]."""

    def commit(self, state: State, step: Step, canvas: Canvas) -> None:
        """After the canvas was written: store pivots or features; video families run the network when `step.closes`."""
