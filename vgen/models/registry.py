"""The table of generator families. Published loading and saved pipelines read it; nothing here imports torch."""

from __future__ import annotations

from typing import Any

from vgen.plugins import class_of, register_class

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
    "mar": ("vgen.models.mar.mar", "MARModel"),
    "himar": ("vgen.models.mar.himar", "HiMARModel"),
    "xar": ("vgen.models.xar.xar", "XARModel"),
    "mingunivision": ("vgen.models.ming.mingunivision", "MingUniVisionModel"),
    "maskgit_vit": ("vgen.models.masked.maskgit", "MaskGITViTModel"),
    "maskgit_uvit": ("vgen.models.masked.maskgit", "MaskGITUViTModel"),
    "maskgen_vq": ("vgen.models.masked.maskgen", "MaskGenVQModel"),
    "maskgen_kl": ("vgen.models.masked.maskgen_kl", "MaskGenKLModel"),
    "tokenbridge_generator": ("vgen.models.mar.tokenbridge", "TokenBridgeModel"),
}


def register_model(family: str, kind: type) -> None:
    """Adds a family of generators to the table, from a module outside of vgen (see `vgen.plugins`): its saved pipelines open from then on.

    kind: a class of diffusers' ModelMixin and ConfigMixin that decodes and learns (vgen/models/base.py). VgenError: it lacks a
    method, or the name of the family or of the class is taken.
    """
    register_class(GENERATORS, "model", family, kind, ("from_pretrained", "start", "predict", "commit"))


def generator_class(family: str) -> Any:
    """The class of a family of GENERATORS. VgenError for an unknown one, naming the nearest."""
    return class_of(GENERATORS, "generator", family)
