"""Reading other people's checkpoints without running their code, and loading them without leaving a gap."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vgen.errors import VgenError

# PyTorch Lightning before 1.5 wrote the state of callbacks under their classes: such a file names them, and needs none of their code.
STAND_INS = tuple(
    f"{package}.callbacks.{name}"
    for package in ("pytorch_lightning", "lightning.pytorch")
    for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")
)
NESTINGS = ("ema", "model", "module", "state_dict")


class StandIn:
    """What a checkpoint's STAND_INS are read as."""


def read_state_dict(
    path: str | Path, prefer: Sequence[str] = NESTINGS, overlay: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU.

    A .safetensors file is read as it is, a folder as the union of its .safetensors files (shards). Anything else goes through `torch.load(weights_only=True)` with argparse.Namespace
    allowed (training scripts store their arguments); of a nested file the first of the names `prefer` that holds tensors wins,
    else the file must be flat. overlay: an entry that a nested file must have as well; its tensors replace those of the same names
    (averages of parameters, beside a state dict that alone has the buffers). TorchScript programs are refused.
    VgenError: missing, truncated, not a checkpoint, needs code to load, no tensors where expected.
    """
    path = Path(path)
    if path.is_dir():
        return _read_shards(path)
    if not path.is_file():
        raise VgenError(f"checkpoint {path} does not exist; check the path or download the file first")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise VgenError(
                f"{path} is not a complete safetensors file ({_first_line(error)}); download it again"
            ) from error
    content = _read_pickle(path)
    state = _unwrap(content, path, prefer)
    return state if overlay is None else {**state, **_unwrap(content, path, (overlay,))}


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """VgenError: no shards, shards that an index names and the folder lacks, or a tensor in two of them."""
    found = sorted(folder.glob("*.safetensors"))
    indices = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.safetensors.index.json")]
    wanted = {name for index in indices for name in index["weight_map"].values()}
    missing = sorted(wanted - {path.name for path in found})
    if missing or not found:
        raise VgenError(f"{folder} lacks {', '.join(missing) or 'any .safetensors file'}; download the whole model")
    state: dict[str, Tensor] = {}
    for path in found:
        shard = read_state_dict(path)
        if twice := state.keys() & shard.keys():
            raise VgenError(f"{folder} holds {min(twice)} in two files; remove what does not belong to the model")
        state |= shard
    return state


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], ignore: Iterable[str] = ()) -> None:
    """Fills every parameter and persistent buffer of `module` from `state` and consumes every key.

    Keys that start with one of `ignore` may be left over. Tensors are assigned, not copied, so a module on the meta device is
    filled without allocating it twice (it must then have no non-persistent buffers: RuntimeError). Integers keep the module's dtype.
    VgenError: counts and first names of missing keys, unexpected keys and differing shapes; the module is then untouched.
    """
    ignore = tuple(ignore)
    wanted = module.state_dict(keep_vars=True)
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted and not key.startswith(ignore)]
    differing = [
        f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if missing or unexpected or differing:
        found = "; ".join(
            f"{len(items)} {label} ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})"
            for label, items in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
            if items
        )
        raise VgenError(
            f"the checkpoint does not fit {type(module).__name__}: expected {len(wanted)} tensors, found {len(state)}: {found}; "
            "choose the size and family that the file was trained with"
        )
    filled = {
        key: state[key] if value.is_floating_point() else state[key].to(value.dtype) for key, value in wanted.items()
    }
    module.load_state_dict(filled, assign=True)
    empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise RuntimeError(
            f"{type(module).__name__} was built on the meta device and the file cannot fill {empty}; compute them lazily"
        )


def _read_pickle(path: Path) -> Any:
    if _is_torchscript(path):
        raise VgenError(
            f"{path} is a TorchScript program, which vgen does not run; pass a plain checkpoint of the same weights"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *((StandIn, name) for name in STAND_INS)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _refused_name(error)
        if refused:
            raise VgenError(
                f"{path} would have to run code to load ({refused}), expected tensors only; vgen refuses that, so save the "
                "state dict alone, best as safetensors"
            ) from error
        raise VgenError(f"{path} is not a torch checkpoint or is cut off; download it again") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise VgenError(
            f"{path} is not a torch checkpoint or is cut off ({_first_line(error)}); download it again"
        ) from error


def _unwrap(content: Any, path: Path, prefer: Sequence[str]) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for name in prefer:
            if _is_state(content.get(name)):
                return dict(content[name])
        if _is_state(content):
            return dict(content)
        found = f"the entries {', '.join(map(str, list(content)[:8]))}"
    else:
        found = f"a {type(content).__name__}"
    raise VgenError(
        f"{path} has no state dict where one is expected (flat, or under {', '.join(prefer)}): it holds {found}; "
        "name the entry that holds the weights, or check that this is the right file"
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(v, Tensor) for v in value.values())


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in archive.namelist())


def _refused_name(error: pickle.UnpicklingError) -> str | None:
    """The name that a weights-only load refused, or None when the file is merely damaged."""
    found = re.search(r"GLOBAL ([\w.]+)|(?:class|function|type) ([\w.]+)", str(error))
    return next((group for group in found.groups() if group), None) if found else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
