"""Locality-aware order (LPD, arXiv 2507.01957): next to what is decoded, apart from what is decoded in the same call.

The cells of a call are taken by proximity to the cells decoded so far, skipping those too close to a cell already taken
in this call; what is missing comes by farthest-point sampling. Windows are square (Chebyshev) but scores and farthest
points use Euclidean distance: the released code, not the paper, decides. Videos use the same rule in three dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.orders.base import PermutedOrder
from vgen.samplers.schedules import default_steps, lpd_sizes
from vgen.samplers.types import Grid, grid_coordinates, grid_size

# Repulsion of the published orders by (positions, steps); 3 is published for 256/20 with the largest model.
PUBLISHED_REPULSION = {(256, 20): 2, (256, 32): 2, (1024, 48): 4}


class Draws(Protocol):
    """The random choices of one order, in the order in which the algorithm makes them."""

    def first(self, count: int) -> int:
        """Index of the first cell."""

    def shuffle(self, count: int) -> np.ndarray:
        """A permutation of `count` cells: new[j] = old[permutation[j]]."""

    def pick(self, count: int) -> int:
        """Index of the first farthest point, where no cell of the call is taken yet."""


@dataclass(frozen=True)
class SeededDraws:
    """Draws from a torch generator on the CPU."""

    generator: torch.Generator

    def first(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self.generator))

    def shuffle(self, count: int) -> np.ndarray:
        return torch.rand(count, dtype=torch.float64, generator=self.generator).argsort(stable=True).numpy()

    pick = first


@dataclass
class RecordedDraws:
    """Replays a recorded run: the first cell, every shuffle (concatenated), the farthest-point picks (if any)."""

    first_cell: int
    shuffles: np.ndarray
    picks: Sequence[int] = ()
    shuffled: int = 0
    picked: int = 0

    def first(self, count: int) -> int:
        return self.first_cell

    def shuffle(self, count: int) -> np.ndarray:
        self.shuffled += count
        return self.shuffles[self.shuffled - count : self.shuffled]

    def pick(self, count: int) -> int:
        self.picked += 1
        return self.picks[self.picked - 1]


def locality_sequence(
    grid: Grid,
    sizes: Sequence[int],
    proximity: float,
    repulsion: float,
    draws: Draws,
    known: Sequence[int] = (),
) -> np.ndarray:
    """Positions in decode order, [sum(sizes)] int64.

    proximity: lowest score (sum of 1/distance over decoded cells of the 3x3 window) that counts as close. repulsion:
    cells of one call are more than this many rows or columns apart, as far as close cells allow it. known: positions
    that are decoded already; without any, the first call starts from one random cell.
    """
    cells = grid_coordinates(grid).numpy()
    scores = np.zeros([side + 2 for side in grid])  # one cell of margin: windows need no bounds checks
    left = np.ones(grid_size(grid), dtype=bool)
    reach = int(repulsion)
    sequence: list[int] = []

    def decode(cell: int) -> None:
        left[cell] = False
        t, h, w = cells[cell]
        scores[t : t + 3, h : h + 3, w : w + 3] += _NEARNESS  # in decode order: the order of fp additions breaks ties

    for cell in known:
        decode(cell)
    for size in sizes:
        remaining = np.flatnonzero(left)
        taken: list[int] = []
        if not sequence and not len(known):
            taken.append(int(remaining[draws.first(len(remaining))]))
            pool = np.setdiff1d(remaining, taken)
        else:
            score = scores[1:-1, 1:-1, 1:-1].reshape(-1)
            shuffled = remaining[draws.shuffle(len(remaining))]
            ranked = shuffled[np.argsort(-score[shuffled], kind="stable")]
            close = ranked[score[ranked] >= proximity]
            taken, rejected, rest = _spread(close, size, reach, cells, grid)
            pool = np.concatenate((ranked[score[ranked] < proximity], rejected, rest)).astype(np.int64)
        if len(taken) < size:
            taken += _farthest(pool, taken, size - len(taken), cells, draws)
        for cell in taken:
            decode(cell)
        sequence += taken
    return np.array(sequence, dtype=np.int64)


def _spread(
    close: np.ndarray, size: int, reach: int, cells: np.ndarray, grid: Grid
) -> tuple[list[int], list[int], np.ndarray]:
    """Walks through `close` and takes up to `size` cells, none within `reach` of another: (taken, rejected, rest)."""
    blocked = np.zeros(grid, dtype=bool)
    taken: list[int] = []
    rejected: list[int] = []
    for place, cell in enumerate(close.tolist()):
        t, h, w = cells[cell]
        if blocked[t, h, w]:
            rejected.append(cell)
            continue
        taken.append(cell)
        low = np.maximum(cells[cell] - reach, 0)
        blocked[tuple(slice(a, b) for a, b in zip(low, cells[cell] + reach + 1))] = True
        if len(taken) == size:
            return taken, rejected, close[place + 1 :]
    return taken, rejected, close[:0]


def _farthest(pool: np.ndarray, taken: Sequence[int], count: int, cells: np.ndarray, draws: Draws) -> list[int]:
    """`count` cells of `pool`, each the farthest from all cells taken so far; ties go to the earliest in the pool."""
    if len(pool) <= count:
        return pool.tolist()
    found: list[int] = []
    distance = np.full(len(pool), np.iinfo(np.int64).max)
    for cell in taken:
        distance = np.minimum(distance, ((cells[pool] - cells[cell]) ** 2).sum(axis=1))
    while len(found) < count:
        index = int(distance.argmax()) if taken or found else draws.pick(len(pool))
        found.append(int(pool[index]))
        distance = np.minimum(distance, ((cells[pool] - cells[pool[index]]) ** 2).sum(axis=1))
    return found


def _nearness() -> np.ndarray:
    weights = np.zeros((3, 3, 3))
    for offset in itertools.product((-1, 0, 1), repeat=3):
        if any(offset):
            weights[tuple(np.array(offset) + 1)] = 1 / np.sqrt(float(np.square(offset).sum()))
    return weights


_NEARNESS = _nearness()  # 1 / distance of the 26 neighbours (edge 1, diagonal 1/sqrt 2), 0 in the centre


class LocalityOrder(PermutedOrder):
    """A locality-aware permutation per sample; known cells are where it starts from."""

    def __init__(self, name: str, grid: Grid, steps: int, proximity: float, repulsion: float, seed: int):
        super().__init__(name, grid, seed, partial(_sizes, steps=steps))
        self.proximity = proximity
        self.repulsion = repulsion

    def permutation(self, generator: torch.Generator, sizes: Sequence[int], known: Tensor | None) -> Tensor:
        given = () if known is None else known.nonzero()[:, 0].tolist()
        draws = SeededDraws(generator)
        return torch.from_numpy(locality_sequence(self.grid, sizes, self.proximity, self.repulsion, draws, given))


def _sizes(tokens: int, steps: int) -> list[int]:
    return lpd_sizes(tokens, min(steps, tokens))


def locality_order(
    grid: Grid, steps: int | None, proximity: float, repulsion: float | None, seed: int
) -> LocalityOrder:
    """`steps` calls with LPD's group sizes. repulsion None: the published value, else about half the mean spacing."""
    tokens = grid_size(grid)
    steps = steps or default_steps(tokens)
    if steps > tokens:
        raise VgenError(f"{tokens} tokens can be decoded in 1 to {tokens} steps, got {steps}")
    if repulsion is None:
        repulsion = PUBLISHED_REPULSION.get((tokens, steps)) or automatic_repulsion(grid, steps)
    return LocalityOrder(f"locality-{steps}", grid, steps, proximity, repulsion, seed)


def automatic_repulsion(grid: Grid, steps: int) -> int:
    """Half the spacing that N/steps cells would have if they were spread evenly, at least 1 (our rule)."""
    axes = max(1, sum(side > 1 for side in grid))
    return max(1, int(steps ** (1 / axes) / 2))
