"""Checkpoints: complete folders `step_00001000/` or nothing.

step_*/ holds `<network>.safetensors` (weights and buffers), `<network>.average.safetensors` (fp32 moving average), `<network>.optimizer.pt` and
`state.json`. Folders are written under a temporary name and renamed, so "the latest checkpoint" is the complete folder with the highest step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from vgen.errors import VgenError
from vgen.files import atomic_folder, remove_folder
from vgen.train.optim import Average

KIND = "checkpoint"  # of the folders, see vgen/files.py
_NAME = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.step_\d{8,}(-\w{8})?")
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Trainee:
    """A prepared network with its optimizers and moving average (None: not averaged)."""

    network: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    average: Average | None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. step: optimizer steps done; state: content of state.json."""

    folder: Path
    step: int
    state: dict[str, Any]


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in a `checkpoints/` folder, oldest first."""
    found = []
    for path in folder.glob("step_*") if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (path / "state.json").is_file():
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            found.append(Checkpoint(path, int(match[1]), state))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def remove_leftovers(folder: Path) -> None:
    """Deletes unfinished folders that a killed process left behind."""
    for path in folder.glob(".step_*"):
        if _LEFTOVER.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def save(
    accelerator: Accelerator, folder: Path, step: int, trainees: Mapping[str, Trainee], state: dict[str, Any]
) -> Path:
    """Writes `folder/step_<step>` from all processes' shards; the main process does the writing."""
    target = folder / f"step_{step:08d}"
    tensors: dict[str, dict[str, Tensor]] = {}
    optimizers: dict[str, dict[str, Any]] = {}
    for name, trainee in trainees.items():  # collective calls: every process takes part
        module = accelerator.unwrap_model(trainee.network)
        tensors[name] = whole_weights(accelerator, trainee)
        optimizers[name] = get_optimizer_state_dict(module, list(trainee.optimizers), options=_WHOLE)
        if trainee.average:
            tensors[f"{name}.average"] = {key: whole(value).cpu() for key, value in trainee.average.values.items()}
    if accelerator.is_main_process and not target.exists():
        with atomic_folder(target, KIND) as temporary:
            for name, content in tensors.items():
                save_file(
                    {key: value.contiguous() for key, value in content.items()}, temporary / f"{name}.safetensors"
                )
            for name, content in optimizers.items():
                torch.save(content, temporary / f"{name}.optimizer.pt")
            (temporary / "state.json").write_text(
                json.dumps({**state, "step": step}, indent=2) + "\n", encoding="utf-8"
            )
    accelerator.wait_for_everyone()
    return target


def load(accelerator: Accelerator, checkpoint: Checkpoint, trainees: Mapping[str, Trainee]) -> None:
    """Puts a checkpoint's weights, averages and optimizer states back. Raises VgenError when it belongs to another model."""
    for name, trainee in trainees.items():
        module = accelerator.unwrap_model(trainee.network)
        try:
            weights = load_file(checkpoint.folder / f"{name}.safetensors")
            set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True, strict=True))
            # weights_only: optimizer states are tensors and plain numbers, never code.
            state = torch.load(checkpoint.folder / f"{name}.optimizer.pt", weights_only=True, map_location="cpu")
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(module, list(trainee.optimizers), state, options=options)
            if trainee.average:
                load_average(checkpoint, name, trainee.average)
        except (OSError, RuntimeError, KeyError, SafetensorError) as error:
            raise VgenError(
                f"checkpoint {checkpoint.folder} does not fit this config or is damaged ({_brief(error)}); "
                "choose another `out=` folder or delete that checkpoint"
            ) from error


def load_average(checkpoint: Checkpoint, name: str, average: Average) -> None:
    """Fills `average` from a checkpoint's averages of network `name`."""
    saved = load_file(checkpoint.folder / f"{name}.average.safetensors")
    for key, value in average.values.items():
        _fill(value, saved[key])


def prune(folder: Path, keep: int, better: int) -> None:
    """Deletes all but the newest `keep` checkpoints and the one with the best score (better: +1 more is better, -1 less, 0 none).

    One that holds anything else (somebody's notes) stays.
    """
    found = checkpoints(folder)
    scored = [checkpoint for checkpoint in found if better and checkpoint.state.get("score") is not None]
    best = max(scored, key=lambda checkpoint: better * checkpoint.state["score"], default=None)
    for checkpoint in found[:-keep]:
        if checkpoint is not best:
            remove_folder(checkpoint.folder, KIND)


def whole_weights(accelerator: Accelerator, trainee: Trainee) -> dict[str, Tensor]:
    """Parameters and buffers of a network, gathered from all processes on the main one's CPU. Collective."""
    return get_model_state_dict(accelerator.unwrap_model(trainee.network), options=_WHOLE)


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its gradient history, gathered when it is sharded (then collective)."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _fill(target: Tensor, value: Tensor) -> None:
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
