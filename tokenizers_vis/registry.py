"""The table of tokenizer families, and how a saved tokenizer is opened."""

from __future__ import annotations

import importlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from vgen.errors import VgenError, nearest

# family -> (module, class). Classes have `from_original(path, config)`, `from_pretrained(folder)`, `spec`, `encode` and `decode`.
TOKENIZERS = {
    "vq": ("vgen.tokenizers_vis.vq", "VQModel"),
    "taming_vqgan": ("vgen.tokenizers_vis.taming_vqgan", "TamingVQGAN"),
    "chameleon_vqgan": ("vgen.tokenizers_vis.chameleon", "ChameleonVQGAN"),
    "maskgit_vqgan": ("vgen.tokenizers_vis.maskgit_vqgan", "MaskGITVQGAN"),
    "titok_vq": ("vgen.tokenizers_vis.titok", "TiTokVQ"),
    "titok_vae": ("vgen.tokenizers_vis.titok", "TiTokVAE"),
    "titok_legacy": ("vgen.tokenizers_vis.titok_legacy", "TiTokLegacy"),
    "kl": ("vgen.tokenizers_vis.kl", "KLModel"),
    "tokenbridge": ("vgen.tokenizers_vis.tokenbridge", "TokenBridge"),
    "mingtok": ("vgen.tokenizers_vis.mingtok", "MingTok"),
    "flextok": ("vgen.tokenizers_vis.flextok", "FlexTok"),
    "flextok_vae": ("vgen.tokenizers_vis.flextok_vae", "FlexTokVAE"),
}

# Tokenizers whose weights are in the package: name -> folder under vgen/assets/.
SHIPPED = {
    "emoji-vq": "emoji/tokenizer",
    "emoji-titok": "tokenizers/emoji-titok",
    "emoji-kl": "tokenizers/emoji-kl",
}


def shipped_tokenizer(name: str) -> ModelMixin:
    """A tokenizer of SHIPPED; no network needed. Raises VgenError for another name."""
    if name not in SHIPPED:
        raise VgenError(f"no tokenizer {name!r} ships with vgen{nearest(name, SHIPPED)}; shipped: {', '.join(SHIPPED)}")
    return open_tokenizer(name)


def tokenizer_class(family: str) -> Any:
    """The class of a family of TOKENIZERS. VgenError for an unknown one, naming the nearest."""
    if family not in TOKENIZERS:
        raise VgenError(
            f"unknown tokenizer family {family!r}{nearest(family, TOKENIZERS)}; families: {', '.join(TOKENIZERS)}"
        )
    module, name = TOKENIZERS[family]
    return getattr(importlib.import_module(module), name)


def find_tokenizer(folder: str | Path) -> Path:
    """The folder that holds a saved tokenizer: `folder` itself, its `tokenizer/` (a pipeline), or that of a name of SHIPPED."""
    name, folder = str(folder), Path(folder)
    if name in SHIPPED and not folder.exists():
        folder = Path(str(resources.files("vgen.assets") / SHIPPED[name]))
    for candidate in (folder, folder / "tokenizer"):
        if (candidate / SAFETENSORS_WEIGHTS_NAME).is_file() and (candidate / "config.json").is_file():
            return candidate
    raise VgenError(
        f"{folder} holds no tokenizer (config.json and {SAFETENSORS_WEIGHTS_NAME}); `vgen train` writes one to RUN/model, "
        f"`vgen convert` makes one of a published file, and with vgen come {', '.join(SHIPPED)}"
    )


def saved_class(folder: str | Path) -> Any:
    """The class of the tokenizer saved in `folder` (see `find_tokenizer`); no weights are read."""
    folder = find_tokenizer(folder)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    families = {name: family for family, (_, name) in TOKENIZERS.items()}
    if kind not in families:
        raise VgenError(
            f"{folder} holds a {kind}, expected a tokenizer ({', '.join(families)}); name the folder of a tokenizer"
        )
    return tokenizer_class(families[kind])


def open_tokenizer(folder: str | Path) -> ModelMixin:
    """The frozen tokenizer saved in `folder` (see `find_tokenizer`), of whatever family, in evaluation mode."""
    folder = find_tokenizer(folder)
    return saved_class(folder).from_pretrained(folder).eval().requires_grad_(False)
