"""Reading other people's checkpoints without running their code, and loading them without leaving a gap."""

from __future__ import annotations

import argparse
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

from vgen.errors import VgenError, first_line
from vgen.saved import index_shards

# PyTorch Lightning before 1.5 wrote the state of callbacks under their classes: such a file names them, and needs none of their code.
STAND_INS = tuple(
    f"{package}.callbacks.{name}"
    for package in ("pytorch_lightning", "lightning.pytorch")
    for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")
)
# Entries that hold a model's tensors, averages first; training scripts nest them in one another.
NESTINGS = ("ema", "model_ema", "ema_model", "ema_state_dict", "model", "module", "state_dict", "model_state_dict")
WRAPPERS = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
)  # torch.compile, FSDP, activation checkpoints
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")


class StandIn:
    """What a checkpoint's STAND_INS are read as."""


def read_state_dict(
    path: str | Path, prefer: Sequence[str] = NESTINGS, overlay: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU.

    A .safetensors file is read as it is; a folder, an index of shards (`….index.json`) or one of numbered shards as the union of its
    files (.safetensors, else .bin; of variants such as `model.fp16.safetensors` only where there is nothing else). Anything else goes
    through `torch.load(weights_only=True)` with argparse.Namespace allowed (training scripts store their arguments); of a nested file
    the first of the names `prefer` that holds tensors wins, at any depth, else the file must be flat. overlay: an entry that a nested
    file must have as well; its tensors replace those of the same names (averages of parameters, beside a state dict that alone has the
    buffers). What wrappers put before or into names (`module.`, `_orig_mod.`, …) is taken off. TorchScript programs are refused.
    VgenError: missing, truncated, not a checkpoint, needs code to load, no tensors where expected.
    """
    path = Path(path)
    if path.is_dir():
        return _union(_files_of(path), path, prefer)
    if not path.is_file():
        raise VgenError(f"checkpoint {path} does not exist; check the path or download the file first")
    if path.suffix == ".json":
        return _union(index_shards(path), path, prefer)
    if numbered := SHARD.fullmatch(path.stem):
        return _union(_numbered(path.parent, numbered, path.suffix), path.parent, prefer)
    return _read_file(path, prefer, overlay)


def _read_file(path: Path, prefer: Sequence[str] = NESTINGS, overlay: str | None = None) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return _bare(safetensors.torch.load_file(path), path)
        except safetensors.SafetensorError as error:
            raise VgenError(
                f"{path} is not a complete safetensors file ({first_line(error)}); download it again"
            ) from error
        except OSError as error:
            raise VgenError(f"{path} cannot be read ({first_line(error)}); check its permissions") from error
    content = _read_pickle(path)
    state = _bare(_unwrap(content, path, prefer), path)
    return state if overlay is None else {**state, **_bare(_unwrap(content, path, (overlay,)), path)}


def _files_of(folder: Path) -> list[Path]:
    """The weights in a folder. VgenError: none, or shards that an index or their numbers name and the folder lacks."""
    for suffix, pattern in ((".safetensors", "*.safetensors"), (".bin", "*model*.bin")):
        named = [shard for index in sorted(folder.glob(f"*{suffix}.index*.json")) for shard in index_shards(index)]
        found = sorted({*folder.glob(pattern), *named})
        for path in found:
            if numbered := SHARD.fullmatch(path.stem):
                _numbered(folder, numbered, suffix)
        plain = {_without_variant(path) for path in found if _without_variant(path) == _unnumbered(path)}
        if found:
            return [path for path in found if _unnumbered(path) in plain or _without_variant(path) not in plain]
    raise VgenError(f"{folder} lacks any .safetensors or .bin file; download the whole model")


def _numbered(folder: Path, shard: re.Match[str], suffix: str) -> list[Path]:
    """All shards of the set that one belongs to. VgenError names those that are not there."""
    count = int(shard["count"])
    files = [folder / f"{shard['name']}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)]
    if missing := [path.name for path in files if not path.is_file()]:
        raise VgenError(f"{folder} lacks {', '.join(missing)}; download the whole model")
    return files


def _unnumbered(path: Path) -> str:
    numbered = SHARD.fullmatch(path.stem)
    return numbered["name"] if numbered else path.stem


def _without_variant(path: Path) -> str:
    """'model' of model.fp16.safetensors and of model.fp16-00001-of-00002.safetensors."""
    return _unnumbered(path).rpartition(".")[0] or _unnumbered(path)


def _union(files: Iterable[Path], source: Path, prefer: Sequence[str]) -> dict[str, Tensor]:
    """VgenError: a tensor in two of the files."""
    state: dict[str, Tensor] = {}
    for path in files:
        shard = _read_file(path, prefer)
        if twice := state.keys() & shard.keys():
            raise VgenError(f"{source} holds {min(twice)} in two files; remove what does not belong to the model")
        state |= shard
    return state


def _bare(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Without what wrappers add: names inside of names, `module.` before all of them, and the counter of an AveragedModel."""
    bare: dict[str, Tensor] = {}
    for key, value in state.items():
        for wrapper in WRAPPERS:
            key = key.replace(wrapper, "")
        if key in bare:
            raise VgenError(f"{path} holds {key} twice, with and without a wrapper's prefix; save one model")
        bare[key] = value
    while len(bare) > 1 and all(key.startswith("module.") or key == "n_averaged" for key in bare):
        bare = {key.removeprefix("module."): value for key, value in bare.items() if key != "n_averaged"}
    return bare


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
    try:
        torchscript = _is_torchscript(path)
    except OSError as error:
        raise VgenError(f"{path} cannot be read ({first_line(error)}); check its permissions") from error
    if torchscript:
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
            f"{path} is not a torch checkpoint or is cut off ({first_line(error)}); download it again"
        ) from error


def _unwrap(content: Any, path: Path, prefer: Sequence[str]) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        if (state := _nested(content, prefer)) is not None:
            return state
        found = f"the entries {', '.join(map(str, list(content)[:8]))}"
    else:
        found = f"a {type(content).__name__}"
    raise VgenError(
        f"{path} has no state dict where one is expected (flat, or under {', '.join(prefer)}): it holds {found}; "
        "name the entry that holds the weights, or check that this is the right file"
    )


def _nested(content: Any, prefer: Sequence[str]) -> dict[str, Tensor] | None:
    """The tensors under the first name of `prefer` that leads to some, through entries of these names; else `content` if it is flat."""
    if not isinstance(content, Mapping):
        return None
    for name in prefer:
        if (state := _nested(content.get(name), prefer)) is not None:
            return state
    return dict(content) if _is_state(content) else None


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(v, Tensor) for v in value.values())


def _is_torchscript(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            names = zipfile.ZipFile(file).namelist()
        except zipfile.BadZipFile:  # an older format, or no checkpoint: torch.load will say
            return False
    return any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in names)


def _refused_name(error: pickle.UnpicklingError) -> str | None:
    """The name that a weights-only load refused, or None when the file is merely damaged."""
    found = re.search(r"GLOBAL ([\w.]+)|(?:class|function|type) ([\w.]+)", str(error))
    return next((group for group in found.groups() if group), None) if found else None
