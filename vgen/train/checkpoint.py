"""Checkpoints: complete folders `step_00001000/` or nothing.

step_*/ holds `<network>.safetensors` (weights and buffers), `<network>.average.safetensors` (fp32 moving average), `<network>.optimizer.pt` and
`state.json`. Folders are written under a temporary name and renamed, so "the latest checkpoint" is the complete folder with the highest step.

Saving is neutral: it reads, and a run with many checkpoints has the weights of a run with none. torch's own `get_optimizer_state_dict`
is not: it takes a step with every optimizer that has no state yet (a discriminator that starts late).
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from vgen.errors import VgenError
from vgen.files import atomic_folder, missing_files, remove_folder
from vgen.train.optim import Average

KIND = "checkpoint"  # of the folders, see vgen/files.py
_NAME = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.step_\d{8,}(-\w{8})?")
# pickle's errors: what torch.load raises for a file cut short
_UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError)
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
    """The complete checkpoints in a `checkpoints/` folder, oldest first. Damaged ones are left out, see `damaged`."""
    found = []
    for step, path in _folders(folder):
        if isinstance(state := _read_state(path, step), dict):
            found.append(Checkpoint(path, step, state))
    return found


def damaged(folder: Path) -> dict[Path, str]:
    """The checkpoints in a `checkpoints/` folder that cannot be read, and why: a disk that was full, a copy that broke off."""
    found = {}
    for step, path in _folders(folder):
        if isinstance(state := _read_state(path, step), str):
            found[path] = state
    return found


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that its step can be saved again; returns the new path."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    target = next(name for name in names if not os.path.lexists(name))
    path.rename(target)
    return target


def _folders(folder: Path) -> list[tuple[int, Path]]:
    named = [(_NAME.fullmatch(path.name), path) for path in (folder.glob("step_*") if folder.is_dir() else ())]
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def _read_state(path: Path, step: int) -> dict[str, Any] | str:
    """The content of state.json, or what is wrong with a checkpoint: of its weights only the descriptions are read."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for file in path.glob("*.safetensors"):
            with safe_open(file, "pt"):  # compares the size of the file with what its header says
                pass
        cut = [file.name for file in path.glob("*.pt") if not zipfile.is_zipfile(file)]
    except FileNotFoundError:
        return "state.json is missing"
    except (OSError, ValueError, SafetensorError) as error:
        return _brief(error) or type(error).__name__
    if missing := [*missing_files(path), *(f"{name} is cut short" for name in cut)]:
        return missing[0]
    if not isinstance(state, dict) or state.get("step") != step:
        return f"state.json does not describe step {step}"
    return state


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
        optimizers[name] = {"state": optimizer_state(module, trainee.optimizers)}
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
            load_optimizer_state(module, trainee.optimizers, state["state"])
            if trainee.average:
                load_average(checkpoint, name, trainee.average)
        except _UNREADABLE as error:
            raise VgenError(
                f"checkpoint {checkpoint.folder} does not fit this config or is damaged ({_brief(error)}); "
                "choose another `out=` folder or delete that checkpoint"
            ) from error


def optimizer_state(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, dict[str, Tensor]]:
    """name of a parameter -> its state ("exp_avg", "momentum_buffer", "step" …) on the CPU; without a state, it is absent.

    Changes nothing. Collective where parameters are sharded.
    """
    states = {}
    for name, parameter in module.named_parameters():
        for optimizer in optimizers:
            if found := optimizer.state.get(parameter):
                states[name] = {key: whole(value).cpu().clone() for key, value in found.items()}
    return states


def load_optimizer_state(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], states: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Puts `optimizer_state` back; parameters it does not name start without one. Learning rates and such stay the config's.

    Raises KeyError for the state of a parameter that no optimizer has, RuntimeError for one of another shape.
    """
    parameters = dict(module.named_parameters())
    if unknown := states.keys() - parameters.keys():
        raise KeyError(f"optimizer state of {min(unknown)}, which is no parameter")
    for optimizer in optimizers:
        numbers = {id(p): n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        content = {
            numbers[id(parameters[name])]: {key: _placed(value, parameters[name]) for key, value in state.items()}
            for name, state in states.items()
            if id(parameters[name]) in numbers
        }
        optimizer.load_state_dict({"state": content, "param_groups": optimizer.state_dict()["param_groups"]})


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


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """One tensor of a parameter's state: sharded as the parameter is, unless it is a counter."""
    if value.dim() == 0:
        return value
    if value.shape != parameter.shape:
        raise RuntimeError(f"optimizer state of shape {list(value.shape)} for a parameter {list(parameter.shape)}")
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _fill(target: Tensor, value: Tensor) -> None:
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
