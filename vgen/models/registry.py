"""The table of generator families. Published loading and saved pipelines read it; nothing here imports torch."""

from __future__ import annotations

import importlib
from typing import Any

from vgen.errors import VgenError, nearest

# family -> (module, class). Classes have `from_pretrained(folder)`; those with published files also `from_original(path, config)`
# and `size_config(size)`, and those that take text `read_words(paths)` for what makes conditions of it.
GENERATORS = {
    "anyorder": ("vgen.models.anyorder", "AnyOrderModel"),
    "llamagen": ("vgen.models.llama.llamagen", "LlamaGenModel"),
    "par": ("vgen.models.llama.par", "PARModel"),
    "nar": ("vgen.models.llama.nar", "NARModel"),
    "rar": ("vgen.models.rar.rar", "RARModel"),
    "dar": ("vgen.models.dar.dar", "DARModel"),
    "flexar": ("vgen.models.flexar.flexar", "FlexARModel"),
    "lumina": ("vgen.models.lumina.lumina", "LuminaModel"),
    "mar": ("vgen.models.mar.mar", "MAR"),
    "himar": ("vgen.models.mar.himar", "HiMAR"),
    "xar": ("vgen.models.xar.xar", "XARModel"),
    "mingunivision": ("vgen.models.ming.mingunivision", "MingUniVision"),
    "maskgit_vit": ("vgen.models.masked.maskgit", "MaskGITViT"),
    "maskgit_uvit": ("vgen.models.masked.maskgit", "MaskGITUViT"),
    "maskgen_vq": ("vgen.models.masked.maskgen", "MaskGenVQ"),
    "maskgen_kl": ("vgen.models.masked.maskgen_kl", "MaskGenKL"),
    "tokenbridge_generator": ("vgen.models.mar.tokenbridge", "TokenBridgeGenerator"),
}


def generator_class(family: str) -> Any:
    """The class of a family of GENERATORS. VgenError for an unknown one, naming the nearest."""
    if family not in GENERATORS:
        raise VgenError(
            f"unknown generator family {family!r}{nearest(family, GENERATORS)}; families: {', '.join(GENERATORS)}"
        )
    module, name = GENERATORS[family]
    return getattr(importlib.import_module(module), name)
