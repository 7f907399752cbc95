"""User-given orders: a file or an array that says which position is decoded when."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.orders.base import FixedOrder, every_position_once
from vgen.samplers.orders.fixed import grouped
from vgen.samplers.schedules import step_sizes
from vgen.samplers.types import Grid, grid_size

FORMS = ("order", "groups", "steps")


def given(grid: Grid, source: Any, sizes: Sequence[int] | None, steps: int | None, schedule: str) -> FixedOrder:
    """An order from `source`: a path (.json, .npy, .txt), a list, a tensor or an array, in one of three forms.

    order: a permutation [N] of raster positions, one per call, or cut by `sizes`, or by `steps` and `schedule`.
    groups: a list of lists of positions, one list per call. steps: a table of step numbers in the shape of the grid;
    equal numbers are decoded together, gaps are closed. {"order" | "groups" | "steps": …} in a .json says which; else a
    flat list is an order, a nested list that holds every position once is groups, and other nested lists, arrays and
    .txt files with a row of numbers per row of the grid are step tables. Raises VgenError unless every position occurs
    exactly once.
    """
    name = f"given-{source}" if isinstance(source, (str, Path)) else "given"
    form, value = _form(_load(source), grid, name)
    if form == "order":
        return _permutation(_integers(value, name), grid, name, sizes, steps, schedule)
    if sizes is not None or steps is not None:
        raise VgenError(f"{name}: 'sizes' and 'steps' cut a permutation, but this is a list of {form}: leave them out")
    if form == "groups":
        return FixedOrder(name, grid, [_integers(group, name) for group in value if len(group)])
    table = _integers(value, name).reshape(-1)
    if len(table) != grid_size(grid):
        raise VgenError(f"{name}: a step table for this grid has {grid_size(grid)} numbers, found {len(table)}")
    return grouped(name, grid, table)


def _permutation(
    positions: Tensor, grid: Grid, name: str, sizes: Sequence[int] | None, steps: int | None, schedule: str
) -> FixedOrder:
    every_position_once(positions, grid_size(grid), name)
    if sizes is not None and steps is not None:
        raise VgenError(f"{name}: give either 'sizes' or 'steps', not both")
    if sizes is None:
        sizes = [1] * len(positions) if steps is None else step_sizes(len(positions), steps, schedule)
    if sum(sizes) != len(positions) or min(sizes) < 1:
        raise VgenError(f"{name}: the sizes must be positive and sum to {len(positions)}, found a sum of {sum(sizes)}")
    return FixedOrder(name, grid, positions.split(list(sizes)))


def _load(source: Any) -> Any:
    if source is None:
        raise VgenError(
            "a given order needs its source, e.g. given-my_order.json: a .json, .npy or .txt file, or an array"
        )
    if not isinstance(source, (str, Path)):
        return source
    path = Path(source)
    if path.suffix not in _READERS:
        raise VgenError(f"an order file ends in {', '.join(_READERS)}, got {path.name!r}")
    try:
        return _READERS[path.suffix](path)
    except OSError as error:
        raise VgenError(f"cannot read the order file {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise VgenError(f"the order file {path} holds something else than whole numbers: {error}") from error


def _read_text(path: Path) -> Any:
    rows = [[int(word) for word in line.replace(",", " ").split()] for line in path.read_text().splitlines()]
    rows = [row for row in rows if row]
    if len(rows) == 1 or all(len(row) == 1 for row in rows):
        return [number for row in rows for number in row]
    return rows if len({len(row) for row in rows}) > 1 else np.array(rows)


_READERS = {
    ".json": lambda path: json.loads(path.read_text()),
    ".npy": lambda path: np.load(path, allow_pickle=False),
    ".txt": _read_text,
}


def _form(value: Any, grid: Grid, name: str) -> tuple[str, Any]:
    """(a name of FORMS, what to read)."""
    if isinstance(value, dict):
        if len(value) != 1 or next(iter(value)) not in FORMS:
            raise VgenError(f"{name}: expected one of the keys {', '.join(FORMS)}, found {', '.join(value) or 'none'}")
        return next(iter(value.items()))
    if isinstance(value, (np.ndarray, Tensor)):
        # A rectangular array that is no table of this grid can still be a list of equally large groups.
        form = "steps" if tuple(value.shape) in (grid, grid[1:], (grid[0] * grid[1], grid[2])) else "groups"
        return ("order" if value.ndim == 1 else form), value
    if not isinstance(value, (list, tuple)):
        raise VgenError(f"{name}: expected a list of positions, groups or step numbers, found {type(value).__name__}")
    if not any(isinstance(entry, (list, tuple)) for entry in value):
        return "order", value
    entries = [number for group in value for number in (group if isinstance(group, (list, tuple)) else [group])]
    if any(isinstance(entry, (list, tuple)) for entry in entries):
        return "steps", value
    shaped = len(value) in (grid[1], grid[0] * grid[1]) and all(len(row) == grid[2] for row in value)
    return "steps" if shaped and sorted(entries) != list(range(grid_size(grid))) else "groups", value


def _integers(value: Any, name: str) -> Tensor:
    """Any nested sequence of whole numbers as an int64 tensor."""
    try:
        array = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    except ValueError as error:
        raise VgenError(f"{name}: the rows have different lengths") from error
    if array.dtype.kind not in "iu":
        raise VgenError(f"{name}: expected whole numbers, found {array.dtype.name} values")
    return torch.from_numpy(array.astype(np.int64))
