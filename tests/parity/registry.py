"""Fixtures and checkers: a recorded run is checked by the checker with the longest matching name (DESIGN.md section 6)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


@dataclass(frozen=True)
class Fixture:
    """One `<family>.<case>.safetensors` file: weights under `w/`, inputs under `in/`, recorded results under `out/`."""

    family: str
    case: str
    config: dict[str, Any]
    notes: str
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


Checker = Callable[[Fixture], None]
CHECKERS: dict[str, Checker] = {}


def checker(*prefixes: str) -> Callable[[Checker], Checker]:
    """Registers a function for every case whose `family.case` starts with one of `prefixes`."""

    def register(function: Checker) -> Checker:
        for prefix in prefixes:
            assert prefix not in CHECKERS, f"two checkers for {prefix}"
            CHECKERS[prefix] = function
        return function

    return register


def find_checker(name: str) -> Checker | None:
    """The checker registered for the longest prefix of `name` that ends at a word boundary (`_`, `.` or the end)."""
    matches = [p for p in CHECKERS if name == p or (name.startswith(p) and name[len(p)] in "_.")]
    return CHECKERS[max(matches, key=len)] if matches else None


def load_fixture(path: Path) -> Fixture:
    groups: dict[str, dict[str, torch.Tensor]] = {"w": {}, "in": {}, "out": {}}
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            group, name = key.split("/", 1)
            groups[group][name] = file.get_tensor(key)
    family, case = path.stem.split(".", 1)
    return Fixture(
        family=meta.get("family", family),
        case=meta.get("case", case),
        config=json.loads(meta.get("config", "{}")),
        notes=meta.get("notes", ""),
        weights=groups["w"],
        inputs=groups["in"],
        outputs=groups["out"],
    )


FLOOR = 1e-6  # absolute: what fp32 leaves of a number that should be zero, where the numbers behind it are around 1


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tol: float = 1e-4, what: str = "") -> None:
    """`|actual - expected| <= tol * max |expected|` (at least `FLOOR`), and equal shapes.

    The scale is the tensor's own: a loss term of 1e-4 must be right to 1e-8 and not to 1e-4, or a missing factor passes.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, recorded {tuple(expected.shape)}"
    if not expected.numel():
        return
    expected = expected.double()
    error = (actual.detach().double() - expected).abs().max().item()
    scale = expected.abs().max().item()
    allowed = max(tol * scale, FLOOR)
    assert error <= allowed, f"{what}: off by {error:.3g} (scale {scale:.3g}, allowed {allowed:.3g})"


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Integers and booleans: exactly equal."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, recorded {tuple(expected.shape)}"
    wrong = (actual.long() != expected.long()).sum().item()
    assert wrong == 0, f"{what}: {wrong} of {expected.numel()} entries differ"
