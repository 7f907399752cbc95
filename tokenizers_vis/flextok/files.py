"""What a published FlexTok file says about itself and its tensors do not: read from its config, never run."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import yaml

from vgen.errors import VgenError
from vgen.saved import read_json


def file_facts(path: str | Path) -> dict[str, Any]:
    """`max_time`, `scale` (of the VAE) and `levels` of a `model.safetensors` (or of its folder), as far as they are written down.

    Looked up in the metadata of the file (one entry per part of the config, each the text of a Python literal or of YAML)
    and in a `config.json` beside it (the same under `config`). Raises VgenError when the file cannot be read.
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise VgenError(f"checkpoint {path} does not exist; check the path or download the file first")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            entries = {key: _literal(value) for key, value in (file.metadata() or {}).items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise VgenError(f"{path} is not a complete safetensors file; download it again") from error
    beside = path.with_name("config.json")
    if beside.is_file():
        content = read_json(beside)
        entries = {**content.get("config", content), **entries}
    wanted = {
        "max_time": _find(entries.get("decoder"), "max_timestep"),
        "scale": _find(entries.get("vae"), "scaling_factor"),
        "levels": _find(entries.get("regularizer"), "levels"),
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _literal(text: str) -> Any:
    """The value of a Python literal, else of YAML with None for null, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    try:
        return yaml.safe_load(text.replace("None", "null"))
    except yaml.YAMLError:
        return text


def _find(value: Any, key: str) -> Any:
    """The first entry named `key` that is not None, at any depth of nested mappings."""
    if not isinstance(value, Mapping):
        return None
    if value.get(key) is not None:
        return value[key]
    return next((found for part in value.values() if (found := _find(part, key)) is not None), None)
