"""Published checkpoints, by their recorded keys and shapes: each size, built on the meta device, has exactly those."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from keys import builders
from torch import nn

HERE = Path(__file__).parent
SHARED = HERE.parents[1].parent / "shared" / "keys"
FOLDER = Path(os.environ.get("VGEN_KEYS_DIR") or (SHARED if SHARED.is_dir() else HERE / "tables"))

BUILDERS: dict[str, Callable[[], nn.Module]] = {}
RENAMES: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {}  # published names -> ours
for module in pkgutil.iter_modules(builders.__path__):
    family = importlib.import_module(f"keys.builders.{module.name}")
    BUILDERS.update(family.BUILDERS)
    RENAMES.update(getattr(family, "RENAMES", {}))


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_keys_and_shapes(name: str):
    table = json.loads((FOLDER / f"{name}.json").read_text())
    with torch.device("meta"):
        module = BUILDERS[name]()
    published = {key: torch.empty(shape, device="meta") for key, shape in _all_keys(table).items()}
    if name in RENAMES:
        published = RENAMES[name](published)
    assert _shapes(module.state_dict()) == _shapes(published)
    expected = table.get("params") or table["config"].get("num_parameters")
    if expected is not None:  # some tables have no count; equal shapes say the same unless there are buffers
        assert sum(p.numel() for p in module.parameters()) == expected


def _all_keys(table: dict[str, Any]) -> dict[str, list[int]]:
    """Keys and shapes of a table, with those that a template stands for: "….{layer}.…" with a range [start, stop) for `layer`."""
    keys = dict(table["state_dict"])
    for template, entry in table.get("state_dict_templates", {}).items():
        ranges = {name: range(*limits) for name, limits in entry.items() if name != "shape"}
        for values in itertools.product(*ranges.values()):
            keys[template.format(**dict(zip(ranges, values)))] = entry["shape"]
    return keys


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in state.items()}
