"""Training configs: YAML and `key=value` overrides merged onto frozen dataclasses, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vgen.errors import VgenError, nearest
from vgen.files import atomic_path
from vgen.train import yaml12

C = TypeVar("C")
VERSION = 1
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
    decay_from: float = (
        0.0  # share of the run at which the cosine begins; before it `lr` is constant, behind the warm-up
    )
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
    precision: str = (
        "fp32"  # fp32, bf16 (autocast, fp32 weights), or auto: bf16 where the hardware has instructions for it
    )
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
    | {"time_limit_minutes", "tensorboard", "out"}
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises VgenError when it is missing, broken, or not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise VgenError(f"there is no config file {path}; configs are YAML files such as configs/emoji/tokenizer.yaml")
    try:
        content = yaml12.load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise VgenError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise VgenError(f"{path} must hold a mapping of settings, found {type(content).__name__}")
    return content


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["steps=10", "optimizer.lr=1e-4"]` -> nested dict, values parsed as YAML 1.2; of two values of one key the later one counts."""
    parsed: dict[str, Any] = {}
    for override in overrides:
        if "=" not in override or override.startswith(("=", "-")):
            raise VgenError(f"expected overrides of the form key=value (e.g. optimizer.lr=1e-4), found {override!r}")
        key, _, text = override.partition("=")
        try:
            value = yaml12.load(text)
        except yaml.YAMLError as error:
            raise VgenError(
                f"the value of {override!r} is not readable YAML ({getattr(error, 'problem', error)}); put quotes around it: "
                f"""'{key}="{text}"'"""
            ) from error
        *groups, name = key.split(".")
        group = parsed
        for part in groups:
            group = group.setdefault(part, {})
            require(isinstance(group, dict), f"{part} is given a value and a setting of its own ({override})")
        group[name] = value
    return parsed


def merge(schema: type[C], *layers: Mapping[str, Any]) -> C:
    """An instance of the frozen dataclass `schema` from defaults and `layers`, later ones winning.

    Raises VgenError for an unknown key (naming the nearest known one), a wrong type, or a missing required value.
    """
    merged = OmegaConf.structured(schema)
    for layer in map(_renamed, layers):
        _refuse_unfit(schema, layer, "")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(dict(layer)))
        except OmegaConfBaseException as error:
            raise _in_a_sentence(error) from error
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        require(not missing, f"{', '.join(missing)} must be set")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:  # ${…} that leads nowhere
        raise _in_a_sentence(error) from error


def require(condition: bool, message: str) -> None:
    """Raises VgenError("config: …") unless `condition`."""
    if not condition:
        raise VgenError(f"config: {message}")


def require_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises VgenError unless `value` is one of `choices`."""
    choices = list(choices)
    require(value in choices, f"{key} must be one of {', '.join(choices)}, found {value!r}{nearest(value, choices)}")


def require_positive(config: Any, *names: str, prefix: str = "") -> None:
    """Raises VgenError unless every named field is above zero."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}{name} must be above 0, found {value}")


def require_not_negative(config: Any, *names: str, prefix: str = "") -> None:
    """Raises VgenError unless every named field is at least zero."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{prefix}{name} must be at least 0, found {value}")


def require_share(config: Any, *names: str, prefix: str = "", below_one: bool = False) -> None:
    """Raises VgenError unless every named field lies in [0, 1], or [0, 1) with `below_one`."""
    for name in names:
        value = getattr(config, name)
        fits = 0 <= value < 1 if below_one else 0 <= value <= 1
        require(fits, f"{prefix}{name} must lie in [0, 1{')' if below_one else ']'}, found {value}")


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


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain nested dicts."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, in the order of the dataclass."""
    return yaml12.dump(to_dict(config))


def save_config(config: Any, path: str | Path) -> None:
    """Writes the resolved config atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`["optimizer.lr: 0.001 -> 0.002"]`: settings that change the weights and differ between two resolved configs."""
    old_flat, new_flat = _flatten(old), _flatten(new)
    return [
        f"{key}: {old_flat.get(key, 'unset')} -> {new_flat.get(key, 'unset')}"
        for key in sorted(old_flat.keys() | new_flat.keys())
        if key.split(".")[0] not in FREE_FIELDS and old_flat.get(key) != new_flat.get(key)
    ]


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _in_a_sentence(error: OmegaConfBaseException) -> VgenError:
    where = f" at `{error.full_key}`" if getattr(error, "full_key", None) else ""
    return VgenError(f"config: {str(error).splitlines()[0]}{where}")


def _renamed(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """A layer of a config in today's words: precision fp32 was called `no`."""
    return {**layer, "precision": "fp32"} if layer.get("precision") == "no" else layer


def _refuse_unfit(schema: type, layer: Mapping[str, Any], prefix: str) -> None:
    """Raises VgenError for keys that `schema` lacks and values of another type: nothing is converted, so nothing is guessed."""
    hints = typing.get_type_hints(schema)
    for key, value in layer.items():
        if key not in hints:
            raise VgenError(
                f"config: unknown key `{prefix}{key}`{nearest(str(key), hints)}; known here: {', '.join(hints)}"
            )
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            require(
                isinstance(value, Mapping),
                f"{prefix}{key} is a group of settings (`{prefix}{key}.KEY`), found {value!r}",
            )
            _refuse_unfit(hint, value, f"{prefix}{key}.")
        elif not _fits(value, hint):
            quote = f""" (put quotes around it: '{key}="{value}"')""" if hint is str and value is not None else ""
            require(False, f"{prefix}{key} must be {_in_words(hint)}, found {_as_yaml(value)}{quote}")
        elif typing.get_origin(hint) is list and dataclasses.is_dataclass(item := typing.get_args(hint)[0]):
            for index, part in enumerate(value):
                _refuse_unfit(item, part, f"{prefix}{key}[{index}].")


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, str) and "${" in value:
        return True  # OmegaConf puts in what it stands for, and checks that
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is typing.Literal:
        return value in parts
    if kind in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    if kind is dict or hint is typing.Any:
        return hint is typing.Any or isinstance(value, Mapping)
    if hint is float:  # a whole number is one; a switch is not, and nothing infinite trains
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _in_words(hint: Any) -> str:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, parts))
    if kind in (list, tuple):
        return f"a list ([…]), each {_in_words(parts[0])}"
    return _WORDS.get(hint, "a group of settings" if kind is dict or dataclasses.is_dataclass(hint) else str(hint))


def _as_yaml(value: Any) -> str:
    """A value as a config would say it: true, null, 'text'."""
    return repr(value) if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
