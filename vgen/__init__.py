"""vgen: autoregressive image and video generation. Any visual tokenizer, any generator, any decode order, one decode loop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name -> module; loaded on first use (PEP 562), so that `import vgen` costs nothing
_LAZY = {
    "AnyOrderModel": "vgen.models.anyorder",
    "Vocabulary": "vgen.models.conditions.vocabulary",
    "VQModel": "vgen.tokenizers_vis.vq",
    "VisualPipeline": "vgen.pipelines.pipeline",
    "UnifiedPipeline": "vgen.pipelines.unified",
    "load": "vgen.convert.load",
    "load_tokenizer": "vgen.convert.load",
    "make_order": "vgen.samplers.orders",
    "decode": "vgen.samplers.decode",
    "Canvas": "vgen.samplers.types",
    "ClassifierFree": "vgen.samplers.guidance",
    "TokenChoice": "vgen.samplers.choice",
    "DiffusionChoice": "vgen.samplers.choice",
    "FlowChoice": "vgen.samplers.choice",
    "PhiloxNoise": "vgen.samplers.noise",
    "VgenError": "vgen.errors",
    "register_order": "vgen.samplers.orders",
    "register_tokenizer": "vgen.tokenizers_vis.registry",
    "register_model": "vgen.models.registry",
    "register_system": "vgen.train.config",
}

# A list, not made of _LAZY: type checkers read it.
__all__ = [
    "AnyOrderModel",
    "Canvas",
    "ClassifierFree",
    "DiffusionChoice",
    "FlowChoice",
    "PhiloxNoise",
    "TokenChoice",
    "UnifiedPipeline",
    "VQModel",
    "VgenError",
    "VisualPipeline",
    "Vocabulary",
    "__version__",
    "decode",
    "load",
    "load_tokenizer",
    "make_order",
    "register_model",
    "register_order",
    "register_system",
    "register_tokenizer",
]

if TYPE_CHECKING:
    from vgen.convert.load import load, load_tokenizer
    from vgen.errors import VgenError
    from vgen.models.anyorder import AnyOrderModel
    from vgen.models.conditions.vocabulary import Vocabulary
    from vgen.models.registry import register_model
    from vgen.pipelines.pipeline import VisualPipeline
    from vgen.pipelines.unified import UnifiedPipeline
    from vgen.samplers.choice import DiffusionChoice, FlowChoice, TokenChoice
    from vgen.samplers.decode import decode
    from vgen.samplers.guidance import ClassifierFree
    from vgen.samplers.noise import PhiloxNoise
    from vgen.samplers.orders import make_order, register_order
    from vgen.samplers.types import Canvas
    from vgen.tokenizers_vis.registry import register_tokenizer
    from vgen.tokenizers_vis.vq import VQModel
    from vgen.train.config import register_system


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
