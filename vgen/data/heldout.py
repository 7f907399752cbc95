"""A held-out split for data that has none: chosen by the keys of the pictures, never by their positions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from vgen.errors import VgenError

# The share that is held out where nothing else is asked for.
HELD_OUT = "5%"
# `open_data(…, held_out=AUTO)`: HELD_OUT, if the data is not divided into splits.
AUTO = "auto"


def check_held_out(held_out: str | int) -> None:
    """Raises VgenError unless it is a share ("5%") or a count ("200")."""
    _amount(held_out)


def choose(keys: Sequence[str], held_out: str | int) -> set[int]:
    """Indices of the pictures held out: at least one, and not all.

    A share holds out a picture by a hash of its own key, so that others may come and go; a count takes the smallest hashes.
    Raises VgenError where there are too few pictures.
    """
    amount, is_share = _amount(held_out)
    hashes = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys]
    order = sorted(range(len(keys)), key=lambda index: (hashes[index], keys[index]))
    count = max(1, sum(value < amount / 100 * 2**64 for value in hashes)) if is_share else int(amount)
    if is_share and count >= len(keys) > 1:
        count = len(keys) - 1
    if count >= len(keys):
        raise VgenError(
            f"holding out {held_out} of {len(keys)} pictures leaves none to train on: expected at least {count + 1} pictures"
        )
    return set(order[:count])


def _amount(held_out: str | int) -> tuple[float, bool]:
    """(percent, True) or (count, False)."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%?)\s*", str(held_out))
    amount, is_share = (float(match[1]), bool(match[2])) if match else (0.0, False)
    if not (0 < amount < 100 if is_share else amount >= 1 and amount == int(amount)):
        raise VgenError(
            f"held_out is a share such as 5% (above 0, below 100) or a number of pictures such as 200, found {held_out}"
        )
    return amount, is_share
