"""From the name of a published checkpoint to a pipeline that samples as its paper does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from vgen.checkpoints import read_state_dict
from vgen.convert.published import Published, locate, names, published
from vgen.errors import VgenError
from vgen.layers.taming import taming_facts
from vgen.models.registry import GENERATORS, generator_class
from vgen.pipelines.visual import VisualPipeline
from vgen.tokenizers_vis.kl import KLModel
from vgen.tokenizers_vis.registry import tokenizer_class
from vgen.tokenizers_vis.taming_vqgan import TamingVQGAN, weights_file

REPORTED = ("precision", "calls")  # what an entry says about its sampling that is no setting of a pipeline


def load_published(name: str, checkpoint_dir: str | Path | None = None) -> VisualPipeline:
    """Loads a published generator with its tokenizer (and text encoder), with the paper's sampling settings as defaults.

    checkpoint_dir: a folder with the files, None: the hub. Raises VgenError for an unknown name, a family that has no
    model yet, and missing or wrong files (saying which are wanted and from where).
    """
    entry = published(name)
    if entry.kind != "generator":
        raise VgenError(
            f"{name} is a {entry.kind.replace('_', ' ')}, expected a generator; `vgen convert --list` says what is what, and "
            "`vgen reconstruct` takes tokenizers"
        )
    if entry.family not in GENERATORS:
        raise VgenError(
            f"{name} is listed, but vgen has no {entry.family} model yet; families: {', '.join(GENERATORS)}"
        )
    paths = locate(name, checkpoint_dir)
    model = generator_class(entry.family).from_original(paths["model"], generator_config(entry))
    if entry.tokenizer is None:
        tokenizer = model.vision  # a unified model's file holds its tokenizer
    else:
        tokenizer = _tokenizer(published(entry.tokenizer), paths["tokenizer"], entry.tokenizer_options)
    model.read_words(paths)
    settings = {key: value for key, value in asdict(entry.sampling).items() if key not in REPORTED}
    return VisualPipeline(tokenizer, model, **settings)


def load_published_tokenizer(name: str, checkpoint_dir: str | Path | None = None) -> ModelMixin:
    """A published tokenizer, ready to code pictures. Arguments and errors as `load_published`."""
    entry = published(name)
    if entry.kind != "tokenizer":
        known = ", ".join(names(kind="tokenizer"))
        raise VgenError(f"{name} is a {entry.kind}, expected one of the tokenizers {known}")
    return _tokenizer(entry, locate(name, checkpoint_dir)["model"])


def load_file(path: str | Path) -> ModelMixin:
    """A tokenizer from somebody's checkpoint file (or a folder with one): what kind it is, its names and shapes say.

    VQGANs of taming-transformers and the VAEs of latent diffusion. Raises VgenError for anything else.
    """
    state = read_state_dict(weights_file(path))
    kind = (
        TamingVQGAN
        if any(name.startswith("quantize.") for name in state) or not taming_facts(state).double_z
        else KLModel
    )
    return kind.from_original(state, None)


def _tokenizer(entry: Published, path: Path, options: Mapping[str, Any] | None = None) -> ModelMixin:
    kind = tokenizer_class(entry.family)
    size = {} if entry.size is None else kind.size_config(entry.size)
    return kind.from_original(path, {**size, **entry.options, **(options or {})})


def generator_config(entry: Published) -> dict[str, Any]:
    """Constructor arguments of a generator: its size, updated by the options of its file."""
    return {**generator_class(entry.family).size_config(entry.size), **entry.options}
