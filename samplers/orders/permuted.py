"""Random order: a uniform permutation per sample, cut at the sizes of a schedule (ARPG, RandAR, MAR)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vgen.samplers.orders.base import PermutedOrder
from vgen.samplers.schedules import default_steps, step_sizes
from vgen.samplers.types import Grid, grid_size


class RandomOrder(PermutedOrder):
    """Uniform permutations; sample i of seed s is the same in every batch."""

    def permutation(self, generator: torch.Generator, sizes: Sequence[int], known: Tensor | None) -> Tensor:
        # Sorting random keys (not randperm, whose algorithm may change): a known position only drops out of the order.
        length = grid_size(self.grid)
        order = torch.rand(length, dtype=torch.float64, generator=generator).argsort(stable=True)
        return order if known is None else order[~known[order]]


def random_order(grid: Grid, steps: int | None, schedule: str, seed: int) -> RandomOrder:
    """`steps` calls with the sizes of `schedule`; fewer when fewer positions are unknown."""
    steps = steps or default_steps(grid_size(grid))
    name = f"random-{steps}" if schedule == "cosine" else f"random:steps={steps},schedule={schedule}"
    return RandomOrder(name, grid, seed, free_steps(grid, steps, schedule))


def free_steps(grid: Grid, steps: int, schedule: str) -> Callable[[int], list[int]]:
    """The size rule of orders with a free number of steps. Raises VgenError for more steps than positions."""
    step_sizes(grid_size(grid), steps, schedule)  # a wrong count or name is an error now, not in the middle of a run
    return lambda tokens: step_sizes(tokens, min(steps, tokens), schedule)
