"""The table of tokenizer families, and how a saved tokenizer is opened. Nothing here imports torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen.errors import VgenError, nearest
from vgen.exports import without_auto_map
from vgen.plugins import class_of, known, register_class
from vgen.saved import WEIGHTS, has_model, open_saved, read_json

if TYPE_CHECKING:
    from diffusers import ModelMixin

# family -> (module, class). Classes have `from_original(path, config)`, `from_pretrained(folder)`, `spec`, `encode` and `decode`.
TOKENIZERS = {
    "vq": ("vgen.tokenizers_vis.vq", "VQModel"),
    "taming_vqgan": ("vgen.tokenizers_vis.taming_vqgan", "TamingVQGAN"),
    "chameleon_vqgan": ("vgen.tokenizers_vis.chameleon", "ChameleonVQGAN"),
    "maskgit_vqgan": ("vgen.tokenizers_vis.maskgit_vqgan", "MaskGITVQGAN"),
    "titok_vq": ("vgen.tokenizers_vis.titok.titok", "TiTokVQ"),
    "titok_vae": ("vgen.tokenizers_vis.titok.titok", "TiTokVAE"),
    "titok_legacy": ("vgen.tokenizers_vis.titok.legacy", "TiTokLegacy"),
    "kl": ("vgen.tokenizers_vis.kl", "KLModel"),
    "tokenbridge": ("vgen.tokenizers_vis.tokenbridge", "TokenBridge"),
    "mingtok": ("vgen.tokenizers_vis.mingtok.mingtok", "MingTok"),
    "flextok": ("vgen.tokenizers_vis.flextok.flextok", "FlexTok"),
    "flextok_vae": ("vgen.tokenizers_vis.flextok.vae", "FlexTokVAE"),
}

# Tokenizers whose weights are in the package: name -> folder under vgen/assets/.
SHIPPED = {
    "emoji-vq": "emoji/tokenizer",
    "emoji-titok": "tokenizers/emoji-titok",
    "emoji-kl": "tokenizers/emoji-kl",
}


def register_tokenizer(family: str, kind: type) -> None:
    """Adds a family of tokenizers to the table, from a module outside of vgen (see `vgen.plugins`): what it saved opens from then on.

    kind: a class of diffusers' ModelMixin and ConfigMixin with `encode`, `decode` and, in what it makes, `spec`
    (tokenizers_vis/base.py). VgenError: it lacks one of them, or the name of the family or of the class is taken.
    """
    register_class(TOKENIZERS, "tokenizer", family, kind, ("from_pretrained", "encode", "decode"))


def tokenizer_class(family: str) -> Any:
    """The class of a family of TOKENIZERS. VgenError for an unknown one, naming the nearest."""
    return class_of(TOKENIZERS, "tokenizer", family)


def find_tokenizer(folder: str | Path) -> Path:
    """The folder that holds a saved tokenizer: `folder` itself, its `tokenizer/` (a pipeline), or that of a name of SHIPPED."""
    name, folder = str(folder), Path(folder)
    if name in SHIPPED and not folder.exists():
        folder = Path(str(resources.files("vgen.assets") / SHIPPED[name]))
    for candidate in (folder, folder / "tokenizer"):
        if has_model(candidate):
            return candidate
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise VgenError(
            f"{folder} {what}{nearest(name, SHIPPED)}; give the folder of a tokenizer; with vgen come {', '.join(SHIPPED)}"
        )
    raise VgenError(
        f"{folder} holds no tokenizer (config.json and {WEIGHTS}.safetensors); `vgen train` writes one to RUN/model, "
        f"`vgen convert` makes one of a published file, and with vgen come {', '.join(SHIPPED)}"
    )


def saved_config(folder: str | Path) -> dict[str, Any]:
    """What the tokenizer saved in `folder` (see `find_tokenizer`) was made with: its class and constructor arguments, no versions."""
    config = without_auto_map(read_json(find_tokenizer(folder) / "config.json"))
    return {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}


def saved_family(folder: str | Path) -> str:
    """The family of the tokenizer saved in `folder` (see `find_tokenizer`). VgenError: none of TOKENIZERS."""
    folder = find_tokenizer(folder)
    kind = read_json(folder / "config.json").get("_class_name")
    if not known(class_families, kind):
        raise VgenError(
            f"{folder} holds a {kind}, expected a tokenizer ({', '.join(class_families())}); name the folder of a tokenizer, or load "
            "the plug-in that this one is from (--plugin MODULE)"
        )
    return class_families()[kind]


def class_families() -> dict[str, str]:
    """Name of a class of TOKENIZERS -> its family."""
    return {name: family for family, (_, name) in TOKENIZERS.items()}


def saved_class(folder: str | Path) -> Any:
    """The class of the tokenizer saved in `folder` (see `find_tokenizer`); no weights are read."""
    return tokenizer_class(saved_family(folder))


def open_tokenizer(folder: str | Path) -> ModelMixin:
    """The frozen tokenizer saved in `folder` (see `find_tokenizer`), of whatever family, in evaluation mode."""
    folder = find_tokenizer(folder)
    return open_saved(saved_class(folder), folder).eval().requires_grad_(False)
