"""Orders that are pure geometry: raster, neighbor, regions, blocks, subsample, halton, hierarchical."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.orders.base import FixedOrder
from vgen.samplers.orders.nexttoken import NextTokenOrder
from vgen.samplers.schedules import default_steps, step_sizes
from vgen.samplers.types import Grid, grid_coordinates, grid_size


def raster(grid: Grid) -> FixedOrder:
    """One token per call: frame by frame, row by row. N calls (LlamaGen and every GPT-like model)."""
    return NextTokenOrder("raster", grid, torch.arange(grid_size(grid)).split(1))


def neighbor(grid: Grid) -> FixedOrder:
    """All positions at the same Manhattan distance t + h + w from the first one at once: T + H + W - 2 calls.

    NAR (arXiv 2503.10696); inside a call by frame, then row.
    """
    return grouped("neighbor", grid, grid_coordinates(grid).sum(dim=1))


def regions(grid: Grid, n: int) -> FixedOrder:
    """n regions decoded side by side, the same cell of every region in one call: n + N/n - 1 calls.

    PAR (arXiv 2412.15119): the first cell of every region one by one (phase 0), then a group of n per call (phase 1). A
    frame is cut into a x b = n equal regions, as square a split as its sides allow (M x M for n = M^2 in the paper).
    Videos: frame after frame, only the first frame's first n tokens sequentially (the paper's 323 and 95 calls).
    """
    frames, height, width = grid
    splits = _splits(height, width)
    if n not in splits:
        raise VgenError(
            f"regions-{n} does not divide a {height}x{width} grid into {n} equal rectangles; "
            f"n can be {', '.join(map(str, splits))}"
        )
    rows, columns = splits[n]
    cells = rearrange(
        torch.arange(grid_size(grid)),
        "(t a y b x) -> (t y x) (a b)",
        t=frames, a=rows, b=columns, y=height // rows, x=width // columns,
    )  # fmt: skip  # [N / n, n]
    groups = [*cells[0].split(1), *cells[1:]]
    return FixedOrder(f"regions-{n}", grid, groups, phases=[0] * n + [1] * (len(cells) - 1))


def _splits(height: int, width: int) -> dict[int, tuple[int, int]]:
    """n -> (rows, columns) of the most nearly square split of a height x width frame into n equal rectangles."""
    splits: dict[int, tuple[int, int]] = {}
    pairs = [(a, b) for a in range(1, height + 1) for b in range(1, width + 1) if not (height % a or width % b)]
    for a, b in sorted(pairs, key=lambda pair: (abs(pair[0] - pair[1]), pair[1] < pair[0])):
        splits.setdefault(a * b, (a, b))
    return dict(sorted(splits.items()))


def blocks(grid: Grid, size: tuple[int, int]) -> FixedOrder:
    """Cells of size h x w in raster order, frame after frame, all tokens of a cell at once (xAR, arXiv 2502.20388).

    T * ceil(H/h) * ceil(W/w) calls: cells at the right and bottom edge are smaller where the sides do not divide.
    """
    height, width = size
    frame, row, column = grid_coordinates(grid).unbind(dim=1)
    down, across = -(-grid[1] // height), -(-grid[2] // width)
    name = f"blocks-{height}" if height == width else f"blocks-{height}x{width}"
    return grouped(name, grid, (frame * down + row // height) * across + column // width)


def subsample(grid: Grid, stride: tuple[int, int]) -> FixedOrder:
    """Strided lattices, one a call: all tokens of a frame with (row mod sh, column mod sw) = (0, 0) first, then (0, 1), …

    The "subsample" entity of xAR (arXiv 2502.20388, figure 2): T * min(H, sh) * min(W, sw) calls, each spread over the frame.
    """
    height, width = stride
    frame, row, column = grid_coordinates(grid).unbind(dim=1)
    name = f"subsample-{height}" if height == width else f"subsample-{height}x{width}"
    return grouped(name, grid, (frame * height + row % height) * width + column % width)


def halton(grid: Grid, steps: int | None, schedule: str) -> FixedOrder:
    """Low discrepancy: every prefix covers the grid evenly (Halton scheduler, arXiv 2503.17076). `steps` calls."""
    sizes = step_sizes(grid_size(grid), steps or default_steps(grid_size(grid)), schedule)
    return FixedOrder(f"halton-{len(sizes)}", grid, halton_rank(grid).argsort().split(sizes))


def hierarchical(grid: Grid, steps: int | None, schedule: str) -> FixedOrder:
    """Coarse to fine: positions on multiples of 2^k first, then 2^(k-1), …; one call per level unless `steps` is given.

    The idea of RandAR's resolution extrapolation (arXiv 2412.01827), over all powers of two;
    low-discrepancy in a level.
    """
    axes = [axis for axis, side in enumerate(grid) if side > 1]
    deepest = (max(grid) - 1).bit_length()
    coordinates = grid_coordinates(grid)[:, axes]
    level = torch.zeros(grid_size(grid), dtype=torch.long)
    for k in range(1, deepest + 1):
        level[(coordinates % 2**k == 0).all(dim=1)] = k
    order = ((deepest - level) * grid_size(grid) + halton_rank(grid)).argsort()
    sizes = (deepest - level).bincount() if steps is None else torch.tensor(step_sizes(len(level), steps, schedule))
    sizes = sizes[sizes > 0].tolist()
    return FixedOrder("hierarchical" if steps is None else f"hierarchical-{steps}", grid, order.split(sizes))


def halton_rank(grid: Grid) -> Tensor:
    """[N] int64: the rank of each position by the first Halton point (bases 5, 2, 3) that falls on it."""
    bases = [(axis, side, base) for axis, (side, base) in enumerate(zip(grid, (5, 2, 3))) if side > 1]
    # Every position contains a base-b interval of length b^-k as soon as b^k >= 2 * side; the first prod(b^k) points of
    # the sequence fall on each box of such intervals exactly once, so that many points reach every position.
    digits = [next(k for k in range(64) if base**k >= 2 * side) for _, side, base in bases]
    count = 1
    for (_, _, base), k in zip(bases, digits):
        count *= base**k
    index = torch.arange(count)
    coordinate = [torch.zeros(count, dtype=torch.long)] * 3
    for (axis, side, base), k in zip(bases, digits):
        reverse, rest = torch.zeros_like(index), index
        for _ in range(k):
            reverse, rest = reverse * base + rest % base, rest // base
        coordinate[axis] = reverse * side // base**k  # the first k digits of the radical inverse, exactly
    position = (coordinate[0] * grid[1] + coordinate[1]) * grid[2] + coordinate[2]
    first = torch.full((grid_size(grid),), count).scatter_reduce_(0, position, index, "amin")
    return first.argsort().argsort()


def grouped(name: str, grid: Grid, call: Tensor, kind: type[FixedOrder] = FixedOrder) -> FixedOrder:
    """Decodes position p in call `call[p]` ([N] integers; gaps are closed), in raster order inside a call."""
    sizes = call.unique(return_counts=True)[1]
    return kind(name, grid, call.argsort(stable=True).split(sizes.tolist()))
