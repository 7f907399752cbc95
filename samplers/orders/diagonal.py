"""Diagonal orders, one token per call, and the coordinates and directions that DAR uses (arXiv 2503.11129)."""

from __future__ import annotations

import torch
from torch import Tensor

from vgen.samplers.orders.base import FixedOrder
from vgen.samplers.types import Grid, grid_coordinates

# (row, column) move to the next token -> direction id. Only these four occur in a zig-zag; other orders jump.
DIRECTIONS = {(0, 1): 0, (1, 0): 1, (1, -1): 2, (-1, 1): 3}
START, JUMP = 4, 5


def diagonal(grid: Grid, way: str, first: str) -> FixedOrder:
    """45-degree diagonals, frame after frame: N calls.

    way: 'zigzag' alternates the direction, so that consecutive tokens always touch (the JPEG order); 'oneway' scans
    every diagonal the same way (DAR's ablation). first: 'right' or 'down', the first move of the zig-zag; 'down' is the
    transpose.
    """
    frame, row, column = grid_coordinates(grid).unbind(dim=1)
    along = row if first == "right" else column  # the coordinate that grows along an odd (or one-way) diagonal
    distance = row + column
    if way == "zigzag":
        along = torch.where(distance % 2 == 0, -along, along)
    side = grid[1] + grid[2]
    order = ((frame * side + distance) * 2 * side + along + side).argsort()
    name = f"diagonal-{way}" if first == "right" else f"diagonal:way={way},first={first}"
    return FixedOrder(name, grid, order.split(1))


def scan_coordinates(order: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(row, column) of the current and of the predicted token for each of the N inputs: [N, 2] int64 each.

    order: [N] raster positions in decode order. Input 0 is the class token at (0, 0); tokens count rows and columns
    from 1.
    """
    target = torch.stack((order // width, order % width), dim=1) + 1
    return torch.cat((torch.zeros_like(target[:1]), target[:-1])), target


def move_directions(order: Tensor, width: int) -> Tensor:
    """Direction id of the move that each of the N inputs makes: [N] int64; `START` for the class token, else
    `DIRECTIONS` (or `JUMP`, for orders other than the zig-zag)."""
    cells = torch.stack((order // width, order % width), dim=1)
    moves = (cells[1:] - cells[:-1]).tolist()
    return torch.tensor([START, *(DIRECTIONS.get((down, right), JUMP) for down, right in moves)])
