"""From the name of a published checkpoint to a pipeline that samples as its paper does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from vgen.convert.published import Published, locate, published
from vgen.errors import VgenError
from vgen.pipelines.visual import VisualPipeline
from vgen.tokenizers_vis.registry import tokenizer_class

# family -> (module, class). Classes have `from_original(path, config)` and `size_config(size)`; those that take text have
# `read_words(paths)` for what makes conditions of it.
GENERATORS = {
    "llamagen": ("vgen.models.llamagen", "LlamaGenModel"),
    "par": ("vgen.models.par", "PARModel"),
    "nar": ("vgen.models.nar", "NARModel"),
    "rar": ("vgen.models.rar", "RARModel"),
    "lumina": ("vgen.models.lumina", "LuminaModel"),
}


def load_published(name: str, checkpoint_dir: str | Path | None = None) -> VisualPipeline:
    """Loads a published generator with its tokenizer (and text encoder), with the paper's sampling settings as defaults.

    checkpoint_dir: a folder with the files, None: the hub. Raises VgenError for an unknown name, a family that has no
    model yet, and missing or wrong files (saying which are wanted and from where).
    """
    entry = published(name)
    if entry.family not in GENERATORS:
        raise VgenError(
            f"{name} is listed, but vgen has no {entry.family} model yet; families: {', '.join(GENERATORS)}"
        )
    paths = locate(name, checkpoint_dir)
    model = _generator_class(entry).from_original(paths["model"], generator_config(entry))
    tokenizer_entry = published(entry.tokenizer)
    tokenizer = tokenizer_class(tokenizer_entry.family).from_original(
        paths["tokenizer"], tokenizer_entry.options or tokenizer_entry.size
    )
    if hasattr(model, "read_words"):
        model.read_words(paths)
    sampling = entry.sampling
    return VisualPipeline(
        tokenizer,
        model,
        order=model.default_order().name,
        guidance_scale=sampling.guidance_scale,
        guidance_schedule=sampling.guidance_schedule,
        guidance_power=sampling.guidance_power,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )


def generator_config(entry: Published) -> dict[str, Any]:
    """Constructor arguments of a generator: its size, updated by the options of its file."""
    return {**_generator_class(entry).size_config(entry.size), **entry.options}


def _generator_class(entry: Published) -> Any:
    module, name = GENERATORS[entry.family]
    return getattr(importlib.import_module(module), name)
