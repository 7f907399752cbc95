"""From a name to a pipeline or a tokenizer: what ships with vgen, published checkpoints, folders, and repositories of the hub.

`load` and `load_tokenizer` are `vgen.load` and `vgen.load_tokenizer`; `check_pipeline` and `check_tokenizer` say without torch
whether a name will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.convert.published import Published, locate, names, published
from vgen.errors import VgenError, nearest
from vgen.models.registry import GENERATORS, generator_class
from vgen.pipelines.components import SHIPPED, component_names, hub_copy, is_hub_name, read_index, shipped_folder
from vgen.tokenizers_vis.registry import SHIPPED as TOKENIZERS
from vgen.tokenizers_vis.registry import open_tokenizer, saved_family, tokenizer_class
from vgen.values import shown

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin

    from vgen.pipelines.pipeline import VisualPipeline
    from vgen.pipelines.visual import Sampler

REPORTED = ("precision", "calls")  # what an entry says about its sampling that is no setting of a pipeline


def load(
    name: str | Path,
    *,
    checkpoint_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> VisualPipeline:
    """The pipeline of a name: shipped ("emoji"), published ("llamagen-c2i-B-256"), a folder, or a repository of the hub (owner/name).

    checkpoint_dir: where the files of a published one are (None: the hub's cache, or download). device: None: where they are made,
    the CPU. dtype: of all parts, a frozen text encoder among them (None: float32, and text encoders as they were trained with).
    A folder's own code is never run. Raises VgenError for a name that is none of these (naming the nearest), missing or wrong files.
    """
    from vgen.pipelines.pipeline import VisualPipeline

    return load_as(VisualPipeline, name, checkpoint_dir=checkpoint_dir, device=device, dtype=dtype)


def load_as(
    kind: type[Sampler],
    name: str | Path,
    *,
    checkpoint_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """As `load`, of the class `kind`: the command line takes `Sampler`, which does not import diffusers' pipelines."""
    check_pipeline(name)
    _check_place(device, dtype)
    if Path(name).is_dir():
        pipe = kind.open(name)
    elif name in SHIPPED:
        pipe = kind.open(shipped_folder(str(name)))
    elif name in names():
        pipe = kind(**published_parts(str(name), checkpoint_dir))
    else:
        pipe = kind.open(hub_copy(str(name)))
    return pipe.move(device, dtype)


def load_tokenizer(
    name: str | Path,
    *,
    checkpoint_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> ModelMixin:
    """The tokenizer of a name: shipped ("emoji-kl"), published ("titok-l32"), a folder with one (or a pipeline's), or a hub repository.

    It is frozen and in evaluation mode. Arguments and errors: as `load`.
    """
    import torch

    check_tokenizer(name)
    _check_place(device, dtype)
    if Path(name).is_dir() or name in TOKENIZERS:
        tokenizer = open_tokenizer(name)
    elif name in names():
        tokenizer = load_published_tokenizer(str(name), checkpoint_dir).eval().requires_grad_(False)
    else:
        tokenizer = open_tokenizer(hub_copy(str(name)))
    return torch.nn.Module.to(tokenizer, device, dtype)


def _check_place(device: Any, dtype: Any) -> None:
    """VgenError unless weights can be moved there."""
    import torch

    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise VgenError(f"device is cpu, cuda, cuda:0, mps or a torch.device, got {shown(device)}") from None
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise VgenError(f"dtype is a torch.dtype such as torch.bfloat16, got {shown(dtype)}")


def _check_name(name: Any) -> None:
    if not isinstance(name, str | Path):
        raise VgenError(f"a model is named by a text or a path, got {shown(name)}")


def check_pipeline(name: str | Path) -> None:
    """VgenError unless `name` is one that `load` takes. Reads no weights, asks no network, imports no torch."""
    _check_name(name)
    if Path(name).exists():
        component_names(read_index(name), name)
    elif name not in (*SHIPPED, *names()) and not is_hub_name(name):
        raise VgenError(
            f"there is no model {str(name)!r}{nearest(str(name), [*SHIPPED, *names()])}; a model is a shipped one "
            f"({', '.join(SHIPPED)}), a published one (`vgen convert --list` prints them), a pipeline folder, or a repository of the "
            "hub (owner/name)"
        )


def check_tokenizer(name: str | Path) -> None:
    """VgenError unless `name` is one that `load_tokenizer` takes. Reads no weights, asks no network, imports no torch."""
    _check_name(name)
    if Path(name).is_dir():
        saved_family(name)
        return
    known = name in TOKENIZERS or (name in names() and published(str(name)).kind == "tokenizer")
    if not known and (Path(name).exists() or not is_hub_name(name)):
        raise VgenError(
            f"there is no tokenizer {str(name)!r}{nearest(str(name), [*TOKENIZERS, *names()])}; a tokenizer is a shipped one "
            f"({', '.join(TOKENIZERS)}), a published one (`vgen convert --list` prints them), a folder, or a repository of the hub "
            "(owner/name)"
        )


def load_published(name: str, checkpoint_dir: str | Path | None = None) -> VisualPipeline:
    """As `load`, of published generators only."""
    from vgen.pipelines.pipeline import VisualPipeline

    return VisualPipeline(**published_parts(name, checkpoint_dir))


def published_parts(name: str, checkpoint_dir: str | Path | None = None) -> dict[str, Any]:
    """Tokenizer, generator (with its text encoder) and the paper's sampling settings: the arguments of a pipeline.

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
    return {"tokenizer": tokenizer, "model": model, **settings}


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
    from vgen.checkpoints import read_state_dict
    from vgen.layers.taming import taming_facts
    from vgen.tokenizers_vis.kl import KLModel
    from vgen.tokenizers_vis.taming_vqgan import TamingVQGAN, weights_file

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
