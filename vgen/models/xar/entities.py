"""What xAR predicts at once, its entities X, and the sequence that they make of a picture (arXiv 2502.20388, figure 2).

    entity              `entities`              tokens of a 16 x 16 grid
    cell (published)    blocks-8, blocks-4x2    squares or rectangles side by side
    patch               raster                  one
    subsample           subsample-4             a strided lattice over the whole grid
    image               blocks-16               all
    scale               scales                  the picture in small, then larger, …, then whole

All but `scales` are orders of `vgen.samplers.orders` with equally large groups; any other such order will do, too. The paper has no
details of the coarse scales. Here they are area means of the latents, each half as large as the next one in both directions, and stand
in the sequence as they are, every token at the centre of what it covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vgen.errors import VgenError
from vgen.layers.masks import step_causal_mask
from vgen.layers.rope2d import rope2d_coarse
from vgen.samplers.orders import FixedOrder, make_order
from vgen.samplers.orders.base import BaseOrder, call_ids
from vgen.samplers.orders.levels import LevelsOrder
from vgen.samplers.types import Grid

SCALES = "scales"


def entity_grids(entities: str, grid: Grid) -> tuple[Grid, ...]:
    """The levels of the canvas, coarse to fine: the grid alone, or for `scales` its halves as long as both sides are even."""
    grids = [grid]
    while entities == SCALES and grids[0][1] % 2 == grids[0][2] % 2 == 0:
        grids.insert(0, (1, grids[0][1] // 2, grids[0][2] // 2))
    return tuple(grids)


def entity_order(entities: str, grid: Grid) -> FixedOrder | LevelsOrder:
    """The order over the levels of the canvas, one entity a call.

    Raises VgenError for an order whose groups differ in size, or between pictures.
    """
    if entities == SCALES:
        return LevelsOrder([make_order("blocks", level, size=level[1:]) for level in entity_grids(entities, grid)])
    order = make_order(entities, grid)
    if not isinstance(order, FixedOrder):
        raise VgenError(
            f"entities are the same in every picture, but the order {entities!r} is not; use cells such as blocks-8"
        )
    sizes = sorted(set(order.sizes), reverse=True)
    if len(sizes) > 1:
        raise VgenError(
            f"entities must be equally large, but {entities!r} cuts the {grid[1]}x{grid[2]} grid into groups of "
            f"{' and '.join(map(str, sizes))} tokens; cells that divide it are {_divisors(grid[1])} tokens high and {_divisors(grid[2])} wide"
        )
    return order


def _divisors(length: int) -> str:
    *others, last = (str(side) for side in range(1, length + 1) if length % side == 0)
    return f"{', '.join(others)} or {last}" if others else last


def with_scales(tokens: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """Tokens [B, H W, C] of the finest of `grids` -> [B, N, C] of all of them, coarse to fine: area means."""
    picture = rearrange(tokens, "b (h w) c -> b c h w", h=grids[-1][1])
    maps = [F.adaptive_avg_pool2d(picture, grid[1:]) for grid in grids[:-1]]
    return torch.cat([*(rearrange(part, "b c h w -> b (h w) c") for part in maps), tokens], dim=1)


@dataclass(frozen=True)
class Layout:
    """The picture as a sequence, entity after entity: slot s holds the token of canvas position `positions[s]`."""

    ends: tuple[int, ...]  # entity k has the slots ends[k] … ends[k + 1] - 1
    positions: Tensor  # [N]
    slots: Tensor  # [N] the inverse: the slot of every position
    entity: Tensor  # [N] the entity of every slot
    rope: Tensor  # [N, head size / 2, 2] by slot
    visible: Tensor  # [N, N] bool: which slots a slot sees

    @classmethod
    def of(cls, order: BaseOrder, grids: tuple[Grid, ...], head_dim: int, device: torch.device | str) -> Layout:
        """The tables of an order over the levels `grids`, on `device`."""
        positions, sizes = order.sequence()
        _, height, width = grids[-1]
        rope = torch.cat([rope2d_coarse(h, w, head_dim, (height // h, width // w)) for _, h, w in grids])[positions]
        entity = call_ids(sizes)
        tables = (positions, positions.argsort(), entity, rope, step_causal_mask(entity))
        return cls((0, *accumulate(sizes)), *(table.to(device) for table in tables))
