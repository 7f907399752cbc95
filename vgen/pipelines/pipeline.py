"""`VisualPipeline`: the `Sampler` with diffusers' base class, for everything that diffusers does with pipelines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from vgen.pipelines.components import (
    HUB_OPTIONS,
    ROLES,
    hub_copy,
    is_hub_name,
    names_moved_modules,
    parts_of,
    shipped_folder,
)
from vgen.pipelines.visual import Sampler, move_encoder


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
        if not source.is_dir() and is_hub_name(source):
            hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
            source = hub_copy(str(source), **hub)
        known = inspect.signature(cls.__init__).parameters
        options = {name: value for name, value in kwargs.items() if name not in known}
        given = {name: value for name, value in kwargs.items() if name in known}
        settings, parts = parts_of(source, cls, given, **options)
        if names_moved_modules(source):  # diffusers would look for its classes where they no longer are
            return cls(**{**settings, **given, **parts})
        return super().from_pretrained(source, **{**kwargs, **parts})

    def to(self, *args: Any, **kwargs: Any) -> VisualPipeline:
        """As diffusers; a frozen text encoder comes along, which is no part of the generator's modules."""
        super().to(*args, **kwargs)
        names = ("device", "dtype")
        device, dtype, *_ = torch._C._nn._parse_to(*args, **{name: kwargs[name] for name in names if name in kwargs})
        move_encoder(self.model, device, dtype)
        return self

    @classmethod
    def open(cls, folder: str | Path) -> VisualPipeline:
        """As `from_pretrained(folder)`."""
        return cls.from_pretrained(folder)

    @classmethod
    def shipped(cls, name: str = "emoji", **kwargs: Any) -> VisualPipeline:
        """A pipeline whose weights come with the package; no network needed."""
        return cls.from_pretrained(shipped_folder(name), **kwargs)
