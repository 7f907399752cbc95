"""Training configs: the table of systems, what every run sets, its ranges, and which settings change the weights.

Nothing here imports torch, so that `vgen train` refuses at once what needs no look at a system, its data or a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vgen.data.splits import layout
from vgen.errors import VgenError, nearest
from vgen.files import check_folder
from vgen.plugins import known, register
from vgen.recipes import find_config
from vgen.settings import (
    merge,
    parse_overrides,
    read_yaml,
    require,
    require_choice,
    require_not_negative,
    require_positive,
    require_share,
)

SYSTEMS = {
    "tokenizer": "vgen.train.systems.tokenizer",
    "vq_tokenizer": "vgen.train.systems.tokenizer",  # its name before it trained other families
    "titok_proxy": "vgen.train.systems.titok_proxy",
    "flextok": "vgen.train.systems.flextok",
    "mingtok": "vgen.train.systems.mingtok",
    "anyorder": "vgen.train.systems.anyorder",
    "llamagen": "vgen.train.systems.llamagen",
    "par": "vgen.train.systems.par",
    "nar": "vgen.train.systems.nar",
    "dar": "vgen.train.systems.dar",
    "rar": "vgen.train.systems.rar",
    "mar": "vgen.train.systems.mar",
    "himar": "vgen.train.systems.himar",
    "xar": "vgen.train.systems.xar",
    "maskgit": "vgen.train.systems.maskgit",
    "maskgen": "vgen.train.systems.maskgen",
    "flexar": "vgen.train.systems.flexar",
    "tokenbridge": "vgen.train.systems.tokenbridge",
}
VERSION = 1
RUN_FILES = ("config.yaml", "log.jsonl", "tensorboard", "previews", "checkpoints", "model")
PRECISIONS = ("auto", "fp32", "bf16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant", "multistep")


@dataclass(frozen=True)
class OptimizerConfig:
    """One network's optimizer and its learning-rate schedule, which is a function of the step alone.

    muon: the 2-D weights of linear layers go to Muon (scaled to AdamW's update size, so `lr` keeps its meaning); embeddings, norms and every
    parameter whose name contains one of `adamw_names` stay with AdamW. Weight decay touches parameters with at least two dimensions only,
    and of AdamW's none whose name contains one of `no_decay_names`. multistep: `lr` times `drop` at each of the `milestones` (shares of the run).
    """

    name: str = "adamw"
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    momentum: float = 0.95  # muon
    adamw_names: list[str] = field(default_factory=lambda: ["embed", "head"])  # muon
    no_decay_names: list[str] = field(default_factory=list)
    warmup_steps: int = 100
    schedule: str = "cosine"
    final_lr: float = 0.0  # share of `lr` left at the last step (cosine)
    # share of the run at which the cosine begins; before it `lr` is constant, behind the warm-up
    decay_from: float = 0.0
    milestones: list[float] = field(default_factory=list)  # multistep
    drop: float = 0.1  # multistep
    clip: float = 1.0  # largest gradient norm; 0: no clipping


@dataclass(frozen=True)
class TrainConfig:
    """What every system shares. A system's own config inherits from this and adds its data, model and losses."""

    version: int
    system: str
    out: str  # run folder: config, log, previews, checkpoints, exported model
    steps: int
    batch_size: int = 32  # per process and forward pass
    accumulate: int = 1  # forward passes per optimizer step
    seed: int = 0
    # fp32, bf16 (autocast, fp32 weights), or auto: bf16 where the hardware has instructions for it
    precision: str = "fp32"
    threads: int = 0  # CPU threads per process; 0: torch decides
    channels_last: bool = False
    ema_decay: float = 0.999  # 0: no averaging
    log_every: int = 50
    preview_every: int = 500  # 0: never
    evaluate_every: int = 500  # 0: never
    checkpoint_every: int = 1000  # 0: only by time and at the end
    checkpoint_minutes: float = 10.0  # 0: only by steps and at the end
    keep: int = 2  # newest checkpoints kept, besides the best
    time_limit_minutes: float = 0.0  # stop cleanly after this long; 0: never. The schedule still follows `steps`
    tensorboard: bool = True
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


# Changing these between two starts of a run does not change its weights; any other difference is refused on resume.
FREE_FIELDS = frozenset(
    {"threads", "log_every", "preview_every", "evaluate_every", "checkpoint_every", "checkpoint_minutes", "keep"}
    | {"time_limit_minutes", "tensorboard", "out", "data.held_out_split"}
    | {f"data.shape.{name}" for name in ("grid", "codes", "channels", "low_grid", "conditions", "code_channels")}
)


def check_common(config: TrainConfig) -> None:
    """Ranges of the shared settings. Systems add their own in `check`."""
    require(config.version == VERSION, f"version must be {VERSION}, found {config.version}")
    require_positive(config, "steps", "batch_size", "accumulate", "log_every", "keep")
    cadences = ("preview_every", "evaluate_every", "checkpoint_every", "checkpoint_minutes", "time_limit_minutes")
    require_not_negative(config, "threads", "seed", *cadences)
    require_choice("precision", config.precision, PRECISIONS)
    require_share(config, "ema_decay", below_one=True)
    require(bool(config.out), "out must name the run folder")
    require(not Path(config.out).is_file(), f"out={config.out} is a file, expected a folder to create or continue")
    check_optimizer(config.optimizer, "optimizer.")


def check_optimizer(config: OptimizerConfig, prefix: str) -> None:
    """Ranges of one optimizer's settings; `prefix` names it in messages ("optimizer.")."""
    require_choice(f"{prefix}name", config.name, OPTIMIZERS)
    require_choice(f"{prefix}schedule", config.schedule, SCHEDULES)
    require_positive(config, "lr", "eps", prefix=prefix)
    require_not_negative(config, "weight_decay", "warmup_steps", "clip", prefix=prefix)
    require_share(config, "beta1", "beta2", "momentum", prefix=prefix, below_one=True)
    require_share(config, "final_lr", "drop", prefix=prefix)
    require_share(config, "decay_from", prefix=prefix, below_one=True)
    require(
        config.schedule == "cosine" or config.decay_from == 0, f"{prefix}decay_from is for the schedule cosine alone"
    )
    marks = config.milestones
    require(
        all(0 < mark < 1 for mark in marks) and bool(marks) == (config.schedule == "multistep"),
        f"{prefix}milestones are shares of the run between 0 and 1, for the schedule multistep and no other, found {marks}",
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`["optimizer.lr: 0.001 -> 0.002"]`: settings that change the weights and differ between two resolved configs."""
    old_flat, new_flat = _flatten(old), _flatten(new)
    return [
        f"{key}: {old_flat.get(key, 'unset')} -> {new_flat.get(key, 'unset')}"
        for key in sorted(old_flat.keys() | new_flat.keys())
        if not FREE_FIELDS & {key, key.split(".")[0]} and old_flat.get(key) != new_flat.get(key)
    ]


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def todays_words(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of a config in today's words: precision fp32 was called `no`."""
    return {**layer, "precision": "fp32"} if layer.get("precision") == "no" else dict(layer)


def register_system(name: str, module: str) -> None:
    """Adds a system to the table, from a module outside of vgen (see `vgen.plugins`): configs then say `system: name`.

    module: the name of a module with `Config`, `check` and `build` (vgen/train/system.py); it is imported when a config asks for it.
    """
    if not isinstance(module, str):
        raise VgenError(
            f"a system is registered by the name of its module (`register_system(…, __name__)`), got {module!r}"
        )
    register(SYSTEMS, "system", name, module, module)


def known_system(name: Any) -> str:
    """`name`. Raises VgenError unless it is one of SYSTEMS."""
    if not known(SYSTEMS, name):
        raise VgenError(f"config: unknown system {name!r}{nearest(str(name), SYSTEMS)}; known: {', '.join(SYSTEMS)}")
    return name


def read_layers(path: str | Path, overrides: Sequence[str] = ()) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The system that a YAML file (a path, or a name of `vgen configs`) and `key=value` overrides name, and both as mappings.

    Raises VgenError for files and overrides that cannot be read, an unknown system, and shared settings that do not fit.
    """
    file, changes = todays_words(read_yaml(find_config(path))), todays_words(parse_overrides(overrides))
    name = {**file, **changes}.get("system")
    if name is None:
        raise VgenError(f"{path} names no system; add `system:` with one of {', '.join(SYSTEMS)}")
    known_system(name)
    shared = [{f.name: layer[f.name] for f in fields(TrainConfig) if f.name in layer} for layer in (file, changes)]
    # `${…}` may stand for what only the system knows.
    if "${" not in str(shared):
        check_common(merge(TrainConfig, *shared))
    return name, file, changes


def check_places(file: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Raises VgenError where the run folder is not ours to write to, or the data of the config's layers is not there.

    For a refusal before torch is imported: systems look closer, and at what `${…}` stands for.
    """
    groups = [layer["data"] for layer in (file, changes) if isinstance(layer.get("data"), Mapping)]
    data = {key: value for group in groups for key, value in group.items()}
    out, path, tokens = (
        value if isinstance(value, str) and value and "${" not in value else None
        for value in ({**file, **changes}.get("out"), data.get("path"), data.get("tokens"))
    )
    if out:
        check_run_folder(Path(out))
    if path and not Path(path).exists():
        try:
            layout(path)  # a pattern of shards, or the words for what is missing
        except VgenError as error:
            raise VgenError(f"config: data.path: {error}") from error
    if tokens and not Path(tokens).is_dir():
        check_token_file(Path(tokens) / f"{data.get('train_split', 'train')}.safetensors")


def check_token_file(path: Path) -> None:
    """Raises VgenError unless the token set is there."""
    require(
        path.is_file(),
        f"data.tokens: {path} does not exist; make it with `vgen tokenize --model … --data … --out {path.parent}`",
    )


def check_run_folder(folder: Path) -> None:
    """Raises VgenError where training would write over something that no training wrote."""
    present = [name for name in RUN_FILES if os.path.lexists(folder / name)]
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    if present and not {"system", "version", "out"} <= config.keys():
        raise VgenError(
            f"{folder} holds {', '.join(present)} and no config.yaml of a vgen run, so they are not ours to replace; "
            "nothing was changed: choose another out= folder, or move them away"
        )
    check_folder(folder / "model")
