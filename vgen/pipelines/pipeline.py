"""`VisualPipeline`: the `Sampler` with diffusers' base class, for everything that diffusers does with pipelines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from vgen.exports import PIPELINE_FILE, exporting, with_auto_map, without_auto_map, write_card
from vgen.models.conditions.base import Conditions
from vgen.pipelines.components import (
    HUB_OPTIONS,
    INDEX,
    ROLES,
    component_class,
    component_names,
    hub_copy,
    is_hub_name,
    parts_of,
    shipped_folder,
)
from vgen.pipelines.visual import Sampler, move_encoder


class VisualPipeline(DiffusionPipeline, Sampler):
    """A tokenizer and a generator that fit together, as a pipeline of diffusers. Arguments and calls: see `Sampler`."""

    model_cpu_offload_seq = "model->tokenizer"

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
        left_out = ("trust_remote_code", "custom_pipeline")  # no code from the folder is run, whatever is allowed
        options = {name: value for name, value in kwargs.items() if name not in (*known, *left_out)}
        given = {name: value for name, value in kwargs.items() if name in known}
        settings, parts = parts_of(source, cls, given, **options)
        pipe = cls(**{**settings, **given, **parts})
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As diffusers, plus a model card, files that let plain diffusers open it, and the mark by which vgen may replace it."""
        names = [type(part).__name__ for part in (self.model, self.tokenizer)]
        card = write_card(
            " with ".join(names),
            f"A pipeline of vgen that makes pictures: the generator `{names[0]}` with the tokenizer `{names[1]}`.",
            "from diffusers import DiffusionPipeline\n\n"
            'pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)\n'
            f"image = pipe({_example(self.model.vocabulary)}).images[0]\n\n"
            '# or, without code from this folder\nimport vgen\n\npipe = vgen.load("FOLDER")',
        )
        with exporting(save_directory, PIPELINE_FILE, card):
            super().save_pretrained(save_directory, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `Sampler`; with `enable_model_cpu_offload` all parts are off the accelerator afterwards. A frozen text encoder stays on the CPU."""
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.maybe_free_model_hooks()

    def wake(self, part: ModelMixin) -> None:
        """Brings a part to the accelerator where `enable_model_cpu_offload` keeps it off, and the part before it back."""
        if hasattr(part, "_hf_hook"):
            part._hf_hook.pre_forward(part)  # accelerate's hooks wait for `forward`, which decoding does not call

    def to_json_string(self) -> str:
        """As diffusers, plus where it finds the class of the pipeline, and AutoModel those of its parts."""
        return with_auto_map(super().to_json_string(), _class_name=[PIPELINE_FILE, type(self).__name__])

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As diffusers, which loads parts only from modules that are imported: imports them, where they are vgen's or a plug-in's."""
        config = without_auto_map(config_dict)
        for role, name in component_names(config, INDEX).items():
            component_class(*name)
            config[role] = list(name)
        return super().extract_init_dict(config, **kwargs)

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


def _example(vocabulary: Conditions | None) -> str:
    """Something that this pipeline can be asked for, as arguments of a call. vocabulary: None: free text, through an encoder."""
    if vocabulary is None:
        return '"a prompt"'
    if vocabulary.unconditional:
        return ""
    if vocabulary.words is not None:
        return repr(next((word for word in vocabulary.words if word.isalpha()), ""))
    return "class_labels=0" if vocabulary.takes_labels else '"a prompt"'
