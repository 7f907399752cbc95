"""Settings: YAML and `key=value` overrides merged onto frozen dataclasses, strictly typed, and checks that name the setting."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vgen import yaml12
from vgen.errors import VgenError, nearest
from vgen.files import atomic_path

C = TypeVar("C")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises VgenError when it is missing, broken, or not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise VgenError(
            f"there is no config file {path}; configs are YAML files, and `vgen configs` lists those that come with vgen"
        )
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
    for layer in layers:
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


def _in_a_sentence(error: OmegaConfBaseException) -> VgenError:
    where = f" at `{error.full_key}`" if getattr(error, "full_key", None) else ""
    return VgenError(f"config: {str(error).splitlines()[0]}{where}")


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
            quote = (
                f""" (put quotes around it: '{key}="{_as_yaml(value)}"')""" if hint is str and value is not None else ""
            )
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
