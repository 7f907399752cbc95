"""`VisualPipeline`: the `Sampler` with diffusers' base class, for everything that diffusers does with pipelines."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from vgen.errors import VgenError, first_line
from vgen.pipelines.components import ROLES, names_moved_modules, parts_of, shipped_folder
from vgen.pipelines.visual import Sampler


class VisualPipeline(DiffusionPipeline, Sampler):
    """A tokenizer and a generator that fit together, as a pipeline of diffusers. Arguments and calls: see `Sampler`."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ROLES and value is not None:
            # diffusers writes the last folder of a module alone where one of its own pipelines has that name: of
            # vgen.models.lumina.lumina it would keep "lumina", which no one could open.
            kind = type(getattr(value, "_orig_mod", value))
            self.register_to_config(**{name: (kind.__module__, kind.__name__)})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> VisualPipeline:
        """A pipeline folder, or a repository of the hub (owner/name), as diffusers; only the modules that it names are imported.

        Raises VgenError for a folder that is not whole or not of this version of vgen, saying which file and what is wrong.
        """
        source = Path(pretrained_model_name_or_path)
        if not source.is_dir():
            source = _from_hub(str(pretrained_model_name_or_path), kwargs)
        known = inspect.signature(cls.__init__).parameters
        options = {name: value for name, value in kwargs.items() if name not in known}
        given = {name: value for name, value in kwargs.items() if name in known}
        settings, parts = parts_of(source, cls, given, **options)
        if names_moved_modules(source):  # diffusers would look for its classes where they no longer are
            return cls(**{**settings, **given, **parts})
        return super().from_pretrained(source, **{**kwargs, **parts})

    def register_modules(self, **modules: Any) -> None:
        """As diffusers, which takes a class for its own where the folder of its module is called like one of its pipelines (lumina)."""
        super().register_modules(**modules)
        for role, module in modules.items():
            # a compiled module is known by what it wraps
            kind = type(getattr(module, "_orig_mod", module))
            self.register_to_config(**{role: (kind.__module__, kind.__name__)})

    @classmethod
    def open(cls, folder: str | Path) -> VisualPipeline:
        """As `from_pretrained(folder)`."""
        return cls.from_pretrained(folder)

    @classmethod
    def shipped(cls, name: str = "emoji", **kwargs: Any) -> VisualPipeline:
        """A pipeline whose weights come with the package; no network needed."""
        return cls.from_pretrained(shipped_folder(name), **kwargs)


def _from_hub(name: str, kwargs: dict[str, Any]) -> Path:
    """The local copy of a hub repository (of the cache, or downloaded). VgenError: no such folder here, and none there."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Path(name)  # no name of the hub: a folder that is missing, which `read_index` says
    from huggingface_hub import snapshot_download

    options = {key: kwargs.pop(key) for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except Exception as error:  # the hub client's errors (HTTP, offline, cache, name) have no common base
        raise VgenError(
            f"there is no folder {name} here, and the hub gave no repository of this name ({type(error).__name__}: "
            f"{first_line(error)}); check the path, or connect to the network"
        ) from error
