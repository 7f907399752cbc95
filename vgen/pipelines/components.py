"""What a saved pipeline may be made of, and what lies in the folder of one. Nothing here imports torch."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from vgen.errors import VgenError, first_line, nearest
from vgen.exports import PIPELINE_FILE, without_auto_map
from vgen.models.registry import GENERATORS
from vgen.plugins import known
from vgen.saved import AGAIN, RENAMED, open_saved, read_json
from vgen.tokenizers_vis.registry import TOKENIZERS

# Where the modules were when vgen 0.1 wrote folders that still open.
MOVED = {
    "vgen.models.dar": "vgen.models.dar.dar",
    "vgen.models.flexar": "vgen.models.flexar.flexar",
    "vgen.models.himar": "vgen.models.mar.himar",
    "vgen.models.llamagen": "vgen.models.llama.llamagen",
    "vgen.models.lumina": "vgen.models.lumina.lumina",
    "vgen.models.mar": "vgen.models.mar.mar",
    "vgen.models.maskgen": "vgen.models.masked.maskgen",
    "vgen.models.maskgen_kl": "vgen.models.masked.maskgen_kl",
    "vgen.models.maskgit": "vgen.models.masked.maskgit",
    "vgen.models.mingunivision": "vgen.models.ming.mingunivision",
    "vgen.models.nar": "vgen.models.llama.nar",
    "vgen.models.par": "vgen.models.llama.par",
    "vgen.models.rar": "vgen.models.rar.rar",
    "vgen.models.tokenbridge": "vgen.models.mar.tokenbridge",
    "vgen.models.xar": "vgen.models.xar.xar",
    "vgen.tokenizers_vis.flextok": "vgen.tokenizers_vis.flextok.flextok",
    "vgen.tokenizers_vis.flextok_vae": "vgen.tokenizers_vis.flextok.vae",
    "vgen.tokenizers_vis.mingtok": "vgen.tokenizers_vis.mingtok.mingtok",
    "vgen.tokenizers_vis.titok": "vgen.tokenizers_vis.titok.titok",
    "vgen.tokenizers_vis.titok_legacy": "vgen.tokenizers_vis.titok.legacy",
}
SHIPPED = ("emoji",)  # pipelines whose weights are in the package, vgen/assets/
ROLES = ("tokenizer", "model")
INDEX = "model_index.json"
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")


def read_index(folder: str | Path) -> dict[str, Any]:
    """`model_index.json` of a pipeline's folder. VgenError: no folder, no such file, one model instead of a pipeline, broken."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise VgenError(f"{folder} {what}; give the folder of a pipeline, which holds a {INDEX}")
    if not (folder / INDEX).is_file():
        raise VgenError(
            f"{folder} holds one model, expected a pipeline ({INDEX}) of tokenizer and generator; name the tokenizer "
            "(data.tokenizer) when training a generator: `vgen train CONFIG data.tokenizer=FOLDER --export PIPELINE` adds it"
            if (folder / "config.json").is_file()
            else f"{folder} has no {INDEX}, so it is not a vgen pipeline; give the folder that `vgen train` exported"
        )
    index = read_json(folder / INDEX)
    found = index.get("_class_name")
    if found not in ("VisualPipeline", [PIPELINE_FILE, "VisualPipeline"]):
        raise VgenError(
            f"{folder / INDEX} describes a {found}, expected a VisualPipeline; vgen opens its own pipelines only"
        )
    return index


def component_modules() -> frozenset[str]:
    """Modules whose classes a saved pipeline may hold: of vgen's tables, with what plug-ins registered.

    Only those that it names are imported, and a file cannot add to this: what is not listed is refused before anything is imported.
    """
    return frozenset(module for module, _ in (*GENERATORS.values(), *TOKENIZERS.values()))


def component_names(index: dict[str, Any], source: str | Path) -> dict[str, tuple[str, str]]:
    """role -> (module, class) of an index; VgenError for a role that is missing or one that is not of `component_modules`."""
    names = {}
    for role in ROLES:
        entry = index.get(role)
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
            raise VgenError(f"{source} names no {role} as [module, class], found {entry!r}; {AGAIN}")
        module = MOVED.get(entry[0], entry[0])
        if not known(component_modules, module):
            raise VgenError(
                f"{source} wants the {role} from {entry[0]}, which is no module of vgen's models nor of a plug-in that is loaded; vgen loads "
                f"no code that a file names: if you trust it, load the plug-in yourself (--plugin {entry[0]}, or import it in Python)"
            )
        names[role] = (module, RENAMED.get(entry[1], entry[1]))
    return names


def component_class(module: str, name: str) -> Any:
    """A class of a module of `component_modules` (see `component_names`). VgenError: the module has no model of this name."""
    found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and found.__module__ == module and hasattr(found, "from_pretrained")):
        raise VgenError(f"{module} has no model {name}; a newer vgen wrote this pipeline: update vgen")
    return found


class Component:
    """What diffusers' AutoModel finds in the folder of a model of vgen (see vgen/exports.py): opens it as what its config says."""

    @staticmethod
    def kind(config: Mapping[str, Any]) -> Any:
        """The class of a config. VgenError: it is none of vgen's nor of a plug-in that is loaded."""
        found = RENAMED.get(config.get("_class_name"), config.get("_class_name"))
        table = {name: module for module, name in (*TOKENIZERS.values(), *GENERATORS.values())}
        if found not in table:
            raise VgenError(
                f"{found} is no model of vgen{nearest(str(found), table)}; if it is of a plug-in, import that first"
            )
        return component_class(table[found], found)

    @classmethod
    def from_pretrained(cls, path: str | Path, subfolder: str | None = None, **options: Any) -> Any:
        """As diffusers' models; a folder must be whole (`open_saved`)."""
        folder = Path(path) / (subfolder or "")
        if folder.is_dir():
            return open_saved(cls.kind(read_json(folder / "config.json")), folder, **options)
        from huggingface_hub import hf_hub_download

        hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
        kind = cls.kind(read_json(hf_hub_download(str(path), "config.json", subfolder=subfolder, **hub)))
        return kind.from_pretrained(path, subfolder=subfolder, **options)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> Any:
        """As diffusers' models: with fresh weights."""
        return cls.kind(config).from_config(config, **options)


def parts_of(
    folder: str | Path, kind: type, given: Mapping[str, Any] | None = None, torch_dtype: Any = None, **options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and opened components of the pipeline in `folder`, for the class `kind`; only the modules that it names are imported.

    given: components by role, which are not opened. torch_dtype (also dtype): one, or one per role (and 'default'). options: of `from_pretrained`.
    VgenError: a folder that is not whole (see `read_index`, `open_saved`), or settings that `kind` does not have.
    """
    index, given = read_index(folder), given or {}
    torch_dtype = options.pop("dtype", torch_dtype)
    known = inspect.signature(kind.__init__).parameters
    settings = {n: value for n, value in without_auto_map(index).items() if not n.startswith("_") and n not in ROLES}
    if newer := [name for name in settings if name not in known]:
        raise VgenError(
            f"{folder} has the settings {', '.join(newer)}, which this vgen does not know; a newer vgen wrote it: update vgen"
        )
    parts = {}
    for role, name in component_names(index, folder).items():
        dtype = torch_dtype.get(role, torch_dtype.get("default")) if isinstance(torch_dtype, Mapping) else torch_dtype
        if (part := given.get(role)) is None:
            part = open_saved(component_class(*name), Path(folder) / role, torch_dtype=dtype, **options)
        parts[role] = part
    return settings, parts


def shipped_folder(name: str) -> Path:
    """Where the pipeline of a name of SHIPPED lies. VgenError for another name."""
    if name not in SHIPPED:
        raise VgenError(
            f"no model {name!r} ships with vgen{nearest(name, SHIPPED)} (shipped: {', '.join(SHIPPED)}); give a pipeline folder"
        )
    return Path(str(resources.files("vgen.assets") / name))


def is_hub_name(name: str | Path) -> bool:
    """Whether this may be a repository of the hub (owner/name): not where `owner` is a folder here, so that a path is meant."""
    name = str(name)
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).parent.exists()


def hub_copy(name: str, **options: Any) -> Path:
    """The local copy of a hub repository (of the cache, or downloaded), without code. options: HUB_OPTIONS.

    VgenError: no such folder here, and none there.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except Exception as error:  # the hub client's errors (HTTP, offline, cache, name) have no common base
        raise VgenError(
            f"there is no folder {name} here, and the hub gave no repository of this name ({type(error).__name__}: "
            f"{first_line(error)}); check the path, or connect to the network"
        ) from error
