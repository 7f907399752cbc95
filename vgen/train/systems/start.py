"""Weights that a training begins with: those of a saved model, whole, in shards or of a variant."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from vgen.checkpoints import load_exactly
from vgen.errors import VgenError
from vgen.saved import saved_shapes, weight_files


def check_start(setting: str, folder: str | Path) -> None:
    """Raises VgenError unless `folder`, given by `setting`, holds whole weights of a saved model; only their names are read."""
    try:
        saved_shapes(weight_files(folder)[0])
    except VgenError as error:
        raise VgenError(f"config: {setting}: {error}; it takes a model's folder, which `vgen train` wrote") from error


def load_start(model: nn.Module, folder: str | Path) -> None:
    """Fills `model` from the weights in `folder`. Raises VgenError where they are of another model or size."""
    load_exactly(model, {name: value for path in weight_files(folder)[0] for name, value in load_file(path).items()})
