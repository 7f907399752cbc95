"""Orders for training: which step every position belongs to, drawn per sample from named and random orders.

One model serves every decode order only if it has seen them. Half of the samples (by default) get a random permutation
cut into a random number of steps, the others a named order; a share has its first steps merged into one, which is what
inpainting looks like (a large block of context that arrives at once).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.orders import make_order
from vgen.samplers.schedules import step_sizes
from vgen.samplers.types import Grid, grid_size


class OrderMixture:
    """Draws step ids [B, N].

    orders: names for `make_order`; random_share: share of random permutations; steps: step counts of the random ones
    (each with every one of `schedules`); merge_share: share whose first steps are merged; pool: how many draws of a
    named order that is itself random (locality) are prepared in advance.
    """

    def __init__(
        self,
        grid: Grid,
        orders: Sequence[str] = (),
        random_share: float = 0.5,
        steps: Sequence[int] = (8, 16, 32, 64),
        schedules: Sequence[str] = ("cosine", "arccos", "linear"),
        merge_share: float = 0.1,
        pool: int = 64,
    ):
        if not 0 <= random_share <= 1 or not 0 <= merge_share <= 1:
            raise VgenError(f"shares of a mixture are between 0 and 1, got random {random_share}, merged {merge_share}")
        tokens = grid_size(grid)
        self.random_share = random_share if orders else 1.0
        self.merge_share = merge_share
        self.named = [self._table(make_order(name, grid), pool) for name in orders]
        counts = sorted({min(count, tokens) for count in steps})
        sizes = [step_sizes(tokens, count, schedule) for count in counts for schedule in schedules]
        self.ranks = torch.stack([torch.repeat_interleave(torch.arange(len(s)), torch.tensor(s)) for s in sizes])

    @staticmethod
    def _table(order, pool: int) -> Tensor:
        """[pool, N] step ids of one named order; fixed orders have one row."""
        draws = [order.step_ids(torch.Generator().manual_seed(i)) for i in range(2)]
        if torch.equal(*draws):
            return draws[0][None]
        return torch.stack([order.step_ids(torch.Generator().manual_seed(i)) for i in range(pool)])

    def sample(self, batch: int, generator: torch.Generator) -> Tensor:
        """Step ids [batch, N] int64 on the CPU."""
        variant = torch.randint(len(self.ranks), (batch,), generator=generator)
        permutation = torch.rand(batch, self.ranks.shape[1], generator=generator).argsort(dim=1)
        step_ids = torch.empty_like(permutation).scatter_(1, permutation, self.ranks[variant])

        named = torch.rand(batch, generator=generator) >= self.random_share
        which = torch.randint(max(len(self.named), 1), (batch,), generator=generator)
        row = torch.rand(batch, generator=generator)
        for index in named.nonzero().flatten().tolist():
            table = self.named[int(which[index])]
            step_ids[index] = table[int(row[index] * len(table))]

        merged = torch.rand(batch, generator=generator) < self.merge_share
        first = torch.rand(batch, generator=generator) * (step_ids.amax(dim=1) + 1)
        return torch.where(merged[:, None], step_ids.clamp_min(first.long()[:, None]), step_ids)
