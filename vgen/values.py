"""Values that come from Python callers: numbers of Python, numpy and torch are read alike, anything else is a VgenError.

A truth value is no number here (`True` as a count is a mistake), and neither is a text. Nothing here imports numpy or torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

from vgen.errors import VgenError


def whole(value: Any, name: str, least: int = 0, most: int | None = None) -> int:
    """`value` as an int from `least` to `most` (None: no end): an int, or a numpy or torch integer of one element.

    name: what it is, for the message, such as "the seed".
    """
    wanted = f"a whole number {f'of at least {least}' if most is None else f'from {least} to {most}'}"
    try:
        number = None if _is_truth(value) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # in this order: of Python, numpy and torch
        number = None
    if number is None:
        raise VgenError(f"{name} must be {wanted}, got {shown(value)}")
    if number < least or (most is not None and number > most):
        raise VgenError(f"{name} must be {wanted}, got {number}")
    return number


def real(value: Any, name: str, least: float = -math.inf) -> float:
    """`value` as a finite float of at least `least`: a number of Python, numpy or torch (of one element)."""
    try:
        number = math.nan if isinstance(value, (str, bytes, bytearray)) or _is_truth(value) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < least:
        wanted = f"a finite number{'' if least == -math.inf else f' of at least {least:g}'}"
        raise VgenError(f"{name} must be {wanted}, got {shown(value)}")
    return number


def string(value: Any, name: str) -> str:
    """`value`, which must be a str (numpy's is one) of whole characters: a byte that a shell gives and that is no UTF-8 is half of one."""
    if not isinstance(value, str):
        raise VgenError(f"{name} must be a text (str), got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise VgenError(f"{name} must be a text of whole characters (UTF-8), got {value!a}") from None
    return str(value)


def several(value: Any, name: str) -> list[Any]:
    """The elements of a list, tuple, range, generator, or one-dimensional array or tensor; at least one.

    Mappings, sets (they have no order) and texts are none of these.
    """
    if isinstance(value, (str, bytes, bytearray, dict, set, frozenset)) or not isinstance(value, Iterable):
        raise VgenError(f"{name} must be a list, got {shown(value)}")
    if getattr(value, "ndim", 1) != 1:
        raise VgenError(f"{name} must be a list, got an array of {value.ndim} dimensions, {list(value.shape)}")
    values = list(value)
    if not values:
        raise VgenError(f"{name} must not be empty; give at least one")
    return values


def shown(value: Any) -> str:
    """A value in a message: short, with its type where the value alone could be mistaken."""
    if value is None or isinstance(value, (bool, float)):
        return str(value)
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if shape:
        return f"a {kind} of shape {list(shape)}"
    written = repr(value)
    return f"{written if len(written) <= 40 else written[:40] + '…'} ({kind})"


def _is_truth(value: Any) -> bool:
    """A bool of Python, numpy or torch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
