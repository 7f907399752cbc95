"""Datasets: picture folders, WebDataset shards, cached tokens; batches that resume exactly."""

from vgen.data.batches import batches, collate
from vgen.data.dataset import ImageDataset, open_images
from vgen.data.tokens import TokenDataset, write_tokens

__all__ = ["ImageDataset", "TokenDataset", "batches", "collate", "open_images", "write_tokens"]
