"""What the guidance rows of Ming-UniVision see: key masks over one shared cache (arXiv 2510.06590 and its release).

There are three rows: cond sees everything, null nothing of what the user says in this turn, image of that only the pictures.
They do not run the prompt again: a picture starts from copies of the conditional row's cache, and the rows differ only in
which keys they see. So null's keys *have* read the text, an approximation of classifier-free guidance. Masks are [3, L]
bool on the host, rows in this order, True: visible.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache

COND, NULL, IMAGE = range(3)


def prompt_masks(ids: Sequence[int], human: Sequence[int], assistant: Sequence[int], kept: Collection[int]) -> Tensor:
    """Masks [3, n] of a prompt of n ids.

    human, assistant: ids of the role prefixes; kept: those that the image row goes on seeing (<image>, <imagePatch>, </image>; the
    newline behind a picture is not among them). What is hidden lies between the *last* human prefix and the assistant's behind it.
    """
    masks = torch.ones(3, len(ids), dtype=torch.bool)
    starts = _find(ids, human)
    if not starts:
        return masks
    begin = starts[-1] + len(human)
    end = next((place for place in _find(ids, assistant) if place >= begin), None)
    if end is not None:
        masks[NULL, begin:end] = False
    user = slice(begin, end)  # without an assistant's prefix, null sees it all but image does not, as released
    masks[IMAGE, user] = torch.tensor([value in kept for value in ids[user]], dtype=torch.bool)
    return masks


def _find(ids: Sequence[int], part: Sequence[int]) -> list[int]:
    """Where `part` occurs."""
    ids, part = list(ids), list(part)
    return [start for start in range(len(ids) - len(part) + 1) if ids[start : start + len(part)] == part]


def extended(masks: Tensor, length: int, visible: bool = True) -> Tensor:
    """[..., L] -> [..., length]: what was generated behind them, seen by all (or by none)."""
    return F.pad(masks, (0, length - masks.shape[-1]), value=visible)


def picture_rows(masks: Tensor, length: int) -> Tensor:
    """Masks [R, length] of a picture that starts behind `length` tokens. R = 3, or 2 where null and image see the same, as
    without an input picture and an earlier round."""
    rows = extended(masks, length)
    return rows[:IMAGE] if torch.equal(rows[NULL], rows[IMAGE]) else rows


def after_round(masks: Tensor, length: int, keep: bool = False) -> Tensor:
    """Masks [3, length] that the next round starts from. masks: of all prompts so far; length: of the cache.

    In the next round image sees all of this one, and null its prompt but not its answer (the release's "DROP"). keep: null
    and image go on not seeing what they did not see ("KEEP").
    """
    cond = extended(masks[COND], length)
    null = extended(masks[NULL if keep else COND], length, visible=False)
    image = extended(masks[IMAGE], length) if keep else cond
    return torch.stack((cond, null, image))


def positions_of(mask: Tensor) -> Tensor:
    """Key masks [B, L] -> rope positions [B, L] int64: visible keys are counted, so a row that sees less is at smaller positions.

    The keys themselves keep the rotation that they entered the cache with.
    """
    return (mask.long().cumsum(dim=1) - 1).clamp_min(0)


def cache_rows(cache: DynamicCache, index: Tensor) -> DynamicCache:
    """A cache of its own with the given rows: tiling to guidance rows, or picking one."""
    taken = type(cache)()
    for number, layer in enumerate(cache.layers):
        taken.update(layer.keys[index], layer.values[index], number)
    return taken
