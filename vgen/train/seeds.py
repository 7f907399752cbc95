"""Randomness of training: every draw of a step comes from a seed made of (run seed, step, process, purpose).

No generator state has to be saved, so a run that restarts at step s draws exactly what the uninterrupted run drew there.
"""

from __future__ import annotations

import hashlib

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
