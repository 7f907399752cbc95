"""What every decode order shares: steps over an empty or partly known canvas, and the tables made from them.

An order plans its calls on the host before the loop starts (one look at the known-mask, the only synchronisation) and
then yields one `Step` per call. Three kinds exist: fixed orders (`FixedOrder`), orders with a permutation per sample
(`PermutedOrder`) and adaptive ones (confidence.py). B samples, N positions, U unknown positions per sample, K calls.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.schedules import scaled_sizes
from vgen.samplers.types import Canvas, Draw, Feed, Grid, Noise, Step, grid_size


def order_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on every integer of `key` (seed, sample, frame, …) and on nothing else."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class OrderStep(Step):
    """A step that also knows how far its own order is: inside `frames` the run goes on when the order is done."""

    ratio: float = 1.0  # share of the calls of this order (this frame) that are done after the step


@dataclass(frozen=True)
class Call:
    """One planned call. `targets` is evaluated when the loop reaches it: adaptive orders see the canvas of that time.

    span: what `Step.unknown` counts over: calls with equal spans (a phase, a frame).
    """

    keep: int
    targets: Callable[[], Tensor]
    ratio: float
    phase: int = 0
    span: tuple[int, ...] = (0,)
    feed: Feed | None = None
    closes: bool = False


class BaseOrder(ABC):
    """Which positions are decoded when (the `Order` contract of samplers/types.py).

    name: as accepted by `make_order`; grid: (T, H, W); calls: forward passes on an empty canvas; varies: in words, what
    the order depends on besides the grid.
    """

    varies = ""

    def __init__(self, name: str, grid: Grid, calls: int):
        self.name = name
        self.grid = grid
        self.calls = calls

    @abstractmethod
    def plan(self, canvas: Canvas) -> list[Call]:
        """The calls that decode the unknown positions of `canvas`."""

    @abstractmethod
    def sequence(self, generator: torch.Generator | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """Positions [N] in decode order on an empty canvas, and the K group sizes that cut them.

        generator: draws a fresh order where there is something to draw; None: the order of sample 0.
        """

    def steps(self, canvas: Canvas) -> Iterator[OrderStep]:
        """One step per call. Raises VgenError for a canvas of another size or with unequal unknown counts."""
        calls = self.plan(canvas)
        start: dict[tuple[int, ...], int] = {}
        for call in calls:
            start[call.span] = start.get(call.span, 0) + call.keep
        left = dict(start)
        for index, call in enumerate(calls):
            before = left[call.span]
            left[call.span] -= call.keep
            yield OrderStep(
                index=index,
                targets=call.targets(),
                keep=call.keep,
                unknown=(before, left[call.span]),
                total=len(calls),
                start_unknown=start[call.span],
                phase=call.phase,
                feed=call.feed,
                closes=call.closes,
                ratio=call.ratio,
            )

    def keep(self, step: Step, draw: Draw, canvas: Canvas, noise: Noise) -> Tensor | None:
        """None: every target stays. Adaptive orders override it."""
        return None

    def groups(self) -> list[Tensor]:
        """The positions of every call on an empty canvas (sample 0's, where samples differ)."""
        positions, sizes = self.sequence()
        return list(positions.split(list(sizes)))

    def step_ids(self, generator: torch.Generator | None = None) -> Tensor:
        """[N] int64: the call in which each raster position is decoded on an empty canvas.

        generator: draws a fresh order (training masks); None: sample 0's. Adaptive orders give a random surrogate.
        """
        positions, sizes = self.sequence(generator)
        return torch.empty_like(positions).scatter_(0, positions, call_ids(sizes))

    def known_mask(self, canvas: Canvas) -> Tensor | None:
        """The known-mask on the host, [B, N] bool, or None when nothing is known. Synchronises once."""
        if canvas.known.shape[1] != grid_size(self.grid):
            raise VgenError(
                f"order {self.name!r} was made for the grid {'x'.join(map(str, self.grid))} ({grid_size(self.grid)} "
                f"positions), the canvas has {canvas.known.shape[1]}: make the order for the canvas's grid"
            )
        known = canvas.known.cpu()
        counts = known.sum(dim=1).tolist()
        if len(set(counts)) > 1:
            raise VgenError(
                f"order {self.name!r} needs equally many unknown positions in every sample, found {min(counts)} to "
                f"{max(counts)} known ones: decode samples with different masks in batches of equal counts"
            )
        return known if counts and counts[0] else None

    def __repr__(self) -> str:
        return f"<order {self.name} on {'x'.join(map(str, self.grid))}: {self.calls} calls>"


class FixedOrder(BaseOrder):
    """The same groups of positions for every sample.

    groups: K tensors or lists of positions, each position exactly once, decoded in their order (the order inside a
    group is kept: it is the order in which a model is fed). phases: one per group (default 0).

    Known positions are dropped, and so are groups that become empty. Samples with different masks get targets [B, m]:
    with equally many unknown positions in every group the groups stay as they are; else each sample's order, restricted
    to its unknown positions, is cut at sizes in proportion to the order's own, so that the batch stays rectangular.
    Only in that last case a sample's steps depend on the masks of its batch mates.
    """

    def __init__(
        self,
        name: str,
        grid: Grid,
        groups: Sequence[Sequence[int] | Tensor],
        phases: Sequence[int] | None = None,
    ):
        super().__init__(name, grid, len(groups))
        tensors = [torch.as_tensor(group, dtype=torch.long) for group in groups]
        self.positions = torch.cat(tensors)
        self.sizes = tuple(len(group) for group in tensors)
        self.phases = tuple(phases) if phases is not None else (0,) * len(tensors)
        every_position_once(self.positions, grid_size(grid), f"order {name!r}")

    def sequence(self, generator: torch.Generator | None = None) -> tuple[Tensor, tuple[int, ...]]:
        return self.positions, self.sizes

    def feeds(self, groups: Sequence[Tensor], known: Tensor | None) -> Sequence[Feed] | None:
        """What a next-token model is fed in every call that decodes `groups` [m] each; None: it cannot follow this order.

        known: [N] bool, what is given, or None.
        """
        return None

    def plan(self, canvas: Canvas) -> list[Call]:
        known = self.known_mask(canvas)
        sequence, sizes = (self.positions, list(self.sizes)) if known is None else self._remaining(known)
        ends = _frame_ends(sequence, sizes, self.grid)
        kept = [k for k, size in enumerate(sizes) if size]
        kept_sizes = [sizes[k] for k in kept]
        feeds = None
        if sequence.dim() == 1:  # the same positions in every sample
            feeds = self.feeds(cut(sequence, kept_sizes), None if known is None else known[0])
        feeds = feeds and on_device(feeds, canvas.values.device)
        parts = cut(sequence.to(canvas.values.device), kept_sizes)
        return [
            Call(
                keep=sizes[k],
                targets=lambda part=part: part,
                ratio=(index + 1) / len(kept),
                phase=self.phases[k],
                span=(self.phases[k],),
                feed=feeds[index] if feeds else None,
                closes=k in ends,
            )
            for index, (k, part) in enumerate(zip(kept, parts))
        ]

    def _remaining(self, known: Tensor) -> tuple[Tensor, list[int]]:
        """Unknown positions in decode order, [U] or [B, U], and how many each of the K groups keeps."""
        unknown = ~known[:, self.positions]  # [B, N], in decode order
        counts = torch.zeros(len(known), self.calls, dtype=torch.long)
        counts.index_add_(1, call_ids(self.sizes), unknown.long())
        left = int(counts[0].sum())
        sequence = self.positions.expand(len(known), -1)[unknown].view(len(known), left)
        if (sequence == sequence[:1]).all():
            sequence = sequence[0]
        same = bool((counts == counts[:1]).all())
        return sequence, counts[0].tolist() if same else scaled_sizes(list(self.sizes), left)


class PermutedOrder(BaseOrder):
    """A permutation of its own for every sample, drawn from (seed, global sample index); group sizes are shared.

    size_rule: number of unknown positions -> group sizes. On a partly known canvas the permutation covers the U unknown
    positions and the sizes are made anew for U.
    """

    varies = "differs by sample"

    def __init__(self, name: str, grid: Grid, seed: int, size_rule: Callable[[int], list[int]]):
        self.seed = seed
        self.size_rule = size_rule
        self.sizes = tuple(size_rule(grid_size(grid)))
        super().__init__(name, grid, len(self.sizes))

    @abstractmethod
    def permutation(self, generator: torch.Generator, sizes: Sequence[int], known: Tensor | None) -> Tensor:
        """The unknown positions [U] of one sample in decode order. known: [N] bool or None."""

    def sequence(self, generator: torch.Generator | None = None) -> tuple[Tensor, tuple[int, ...]]:
        return self.permutation(generator or order_generator(self.seed, 0), self.sizes, None), self.sizes

    def plan(self, canvas: Canvas) -> list[Call]:
        known = self.known_mask(canvas)
        left = canvas.known.shape[1] - (0 if known is None else int(known[0].sum()))
        sizes = self.size_rule(left) if left else []
        rows = [
            self.permutation(order_generator(self.seed, sample), sizes, None if known is None else known[row])
            for row, sample in enumerate(canvas.samples.tolist())
        ]
        parts = cut(torch.stack(rows).to(canvas.values.device), sizes)
        last = len(sizes) - 1
        return [
            Call(keep=size, targets=lambda part=part: part, ratio=(k + 1) / len(sizes), closes=k == last)
            for k, (size, part) in enumerate(zip(sizes, parts))
        ]


def call_ids(sizes: Sequence[int]) -> Tensor:
    """The call of every place in decode order: sizes (2, 1) -> [0, 0, 1]."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))


def cut(sequence: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """[..., U] -> one view [..., m] per size."""
    return sequence.split(list(sizes), dim=-1) if len(sizes) else ()


def every_position_once(positions: Tensor, size: int, what: str) -> None:
    """Raises VgenError unless `positions` holds 0 … size-1, each exactly once."""
    outside = positions[(positions < 0) | (positions >= size)]
    if len(outside):
        raise VgenError(f"{what}: positions run from 0 to {size - 1}, found {int(outside[0])}")
    counts = torch.bincount(positions, minlength=size)
    wrong = (counts != 1).nonzero()
    if len(wrong):
        position = int(wrong[0])
        found = "is missing" if counts[position] == 0 else f"occurs {int(counts[position])} times"
        raise VgenError(f"{what}: every one of the {size} positions must occur exactly once, but {position} {found}")


def on_device(feeds: Sequence[Feed], device: torch.device) -> list[Feed]:
    """The same feeds on `device`, copied at once."""
    columns = []
    for name in ("source", "slot", "reads"):
        parts = [getattr(feed, name) for feed in feeds]
        columns.append(torch.cat(parts).to(device).split([len(part) for part in parts]))
    return [Feed(*row, blanks=feed.blanks) for feed, *row in zip(feeds, *columns)]


def _frame_ends(sequence: Tensor, sizes: Sequence[int], grid: Grid) -> set[int]:
    """Calls after which a frame is complete: every frame's last call, or only the final one where samples differ."""
    calls = call_ids(sizes)
    if sequence.dim() == 2 or not len(calls):
        return {k for k, size in enumerate(sizes) if size and not any(sizes[k + 1 :])}
    last = torch.full((grid[0],), -1).scatter_reduce_(0, sequence // (grid[1] * grid[2]), calls, "amax")
    return set(last.tolist()) - {-1}
