"""Datasets: picture folders, WebDataset shards, cached tokens; batches that resume exactly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# public name -> module; loaded on first use, so that looking at the names of files needs no torch
_LAZY = {
    "ImageDataset": "vgen.data.dataset",
    "TokenDataset": "vgen.data.tokens",
    "collate": "vgen.data.batches",
    "open_data": "vgen.data.sources",
    "open_images": "vgen.data.dataset",
    "write_tokens": "vgen.data.tokens",
}

__all__ = ["ImageDataset", "TokenDataset", "collate", "open_data", "open_images", "write_tokens"]

if TYPE_CHECKING:
    from vgen.data.batches import collate
    from vgen.data.dataset import ImageDataset, open_images
    from vgen.data.sources import open_data
    from vgen.data.tokens import TokenDataset, write_tokens


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vgen.data' has no attribute {name!r}")
