"""ZipAR: rows decoded side by side (arXiv 2412.04062, training-free for raster models)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgen.errors import VgenError
from vgen.samplers.orders.adaptive_zip import AdaptiveZip
from vgen.samplers.orders.base import BaseOrder, FixedOrder
from vgen.samplers.orders.fixed import grouped
from vgen.samplers.orders.nexttoken import NextTokenOrder
from vgen.samplers.types import Feed, Grid, grid_coordinates, grid_size


def zip_rows(grid: Grid, window: int, faithful: bool, adaptive: bool) -> BaseOrder:
    """Row r + 1 starts as soon as row r holds `window` tokens: column c of row r is decoded in call r * window + c.

    T * (W + (H - 1) * min(window, W)) calls, frame after frame; a full-width window is raster order, window 1 is the
    anti-diagonal wavefront. A next-token model is fed the nearest decoded token for a row end that is missing, and
    never sees slots that were not fed (`NextTokenOrder`).
    faithful: the released LlamaGen variant instead (`llamagen_schedule`), with its own substitutes and with the slots
    that were not fed yet visible as zeros: 2W + (H - 2) * window calls, pictures only.
    adaptive: a row starts when the model is sure of its first token (`AdaptiveZip`), at the earliest after `window` tokens.
    """
    if faithful and adaptive:
        raise VgenError("zip is either faithful to the released code or adaptive, which was not released; choose one")
    if adaptive:
        return AdaptiveZip(grid, window)
    if faithful:
        return _faithful(grid, window)
    frame, row, column = grid_coordinates(grid).unbind(dim=1)
    shift = min(window, grid[2])
    call = frame * (grid[2] + (grid[1] - 1) * shift) + row * shift + column
    return grouped(f"zip-{window}", grid, call, NextTokenOrder)


@dataclass(frozen=True)
class Fed:
    """A token fed in one call: the value of `source` enters at position `slot` and answers `predicted` (-1: none).

    slot and source -1: the condition. source != slot: a substitute.
    """

    slot: int
    source: int
    predicted: int


def llamagen_schedule(height: int, width: int, window: int) -> list[list[Fed]]:
    """What the released LlamaGen variant feeds in each call (spec: rows of equal calls, rows ascending).

    Row 0 is decoded alone and row 1 starts after it; from row 1 on the window rule holds. The first token of row r >= 2
    needs the last token of row r - 1: the newest token of row r - 2 stands in for it, and when row r - 1 is complete
    its true last token is fed once more, only to refresh the cache. window >= width is raster decoding (the released
    code breaks there); window 1 is refused, as released.
    """
    if window < 2:
        raise VgenError(f"faithful zip needs a window of at least 2 tokens, got {window}")
    raster_rows = height if window >= width else 1
    calls = [[Fed(-1, -1, 0)]] + [[Fed(p - 1, p - 1, p)] for p in range(1, raster_rows * width)]
    if raster_rows == height:
        return calls
    decoded = [width] + [0] * (height - 1)
    first_source = {1: width - 1}  # row -> whose value enters for its first token
    active, refresh = [1], []
    while active:
        fed = [Fed(slot, slot, -1) for slot in refresh]
        refresh, started, finished = [], [], []
        for row in active:
            start, count = row * width, decoded[row]
            slot = start + count - 1
            fed.append(Fed(slot, slot if count else first_source[row], start + count))
            decoded[row] += 1
            if decoded[row] == window and row + 1 < height:
                first_source[row + 1] = (row - 1) * width + decoded[row - 1] - 1
                started.append(row + 1)
            if decoded[row] == width:
                finished.append(row)
                refresh += [start + width - 1] if row + 1 < height else []
        active = [row for row in active if row not in finished] + started
        calls.append(fed)
    return calls


def _faithful(grid: Grid, window: int) -> FixedOrder:
    frames, height, width = grid
    if frames > 1:
        raise VgenError(f"faithful zip is defined for pictures, got {frames} frames; use zip without it")
    return FaithfulZip(f"zip:window={window},faithful=true", grid, llamagen_schedule(height, width, window))


class FaithfulZip(FixedOrder):
    """The released schedule. Phase 0 is the first row, phase 1 the rest: its guidance interval counts them separately."""

    def __init__(self, name: str, grid: Grid, schedule: list[list[Fed]]):
        groups, feeds, phases = [], [], []
        for call in schedule:
            reads = [row for row, fed in enumerate(call) if fed.predicted >= 0]
            groups.append([call[row].predicted for row in reads])
            slots, sources = [fed.slot for fed in call], [fed.source for fed in call]
            feeds.append(Feed(torch.tensor(sources), torch.tensor(slots), torch.tensor(reads), blanks=True))
            phases.append(0 if len(schedule) == grid_size(grid) or groups[-1][0] < grid[2] else 1)
        super().__init__(name, grid, groups, phases)
        self.schedule = feeds

    def feeds(self, groups: Sequence[Tensor], known: Tensor | None) -> Sequence[Feed]:
        if known is not None:
            raise VgenError(
                f"order {self.name!r} replays a recorded feed and needs an empty canvas; use 'zip' without it"
            )
        return self.schedule
