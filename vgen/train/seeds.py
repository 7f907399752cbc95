"""Randomness of training: every draw of a step comes from a seed made of (run seed, step, process, purpose).

No generator state has to be saved, so a run that restarts at step s draws exactly what the uninterrupted run drew there.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed: the first bytes of SHA-256 over the parts. Stable across machines and Python versions."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def step_generator(seed: int, *parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` for (seed, *parts); also seeds torch's global generators, which dropout draws from."""
    value = derived_seed(seed, *parts)
    torch.manual_seed(value)
    return torch.Generator(device=device).manual_seed(value)


@contextmanager
def kept_draws(device: torch.device) -> Iterator[None]:
    """Whatever is drawn within the block, from torch's, numpy's or Python's global generators, what follows draws as if it had not been."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
