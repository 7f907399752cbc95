"""The key/value cache: preallocated, addressed by slot, overwritable. Keys are stored after RoPE.

Masks do not live here: which slots a query may see belongs to the model's plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `layers` attention layers: [layers, rows, heads, slots, head_dim] each, zero at the start.

    Zeros matter: ZipAR's LlamaGen variant attends to slots that were never written.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        slots: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (layers, rows, heads, slots, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def write(self, layer: int, slots: slice | Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [rows, heads, n, head_dim] at `slots`: a slice, [n], or [rows, n] int64."""
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if isinstance(slots, slice):
                store[:, :, slots] = new
            elif slots.dim() == 1:
                store.index_copy_(2, slots, new.to(store.dtype))
            else:
                index = slots[:, None, :, None].expand_as(new)
                store.scatter_(2, index, new.to(store.dtype))

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots 0..length-1: views [rows, heads, length, head_dim]."""
        return self.keys[layer, :, :, :length], self.values[layer, :, :, :length]

    def extend(
        self, layer: int, slots: slice | Tensor, keys: Tensor, values: Tensor, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """`write`, then `read` of what is there now: before attending, since the tokens of one call may see each other.

        length: slots that are read; None: up to the end of a slice.
        """
        self.write(layer, slots, keys, values)
        return self.read(layer, slots.stop if length is None else length)


@dataclass(frozen=True)
class Memory:
    """Where one layer keeps the tokens at hand, and how many slots it then reads (None: up to the end of a slice)."""

    cache: KVCache
    layer: int
    slots: slice | Tensor
    length: int | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, n, head_dim] of the tokens at hand -> those of all tokens that are read."""
        return self.cache.extend(self.layer, self.slots, keys, values, self.length)


def remember(cache: KVCache | None, layer: int, slots: slice | Tensor) -> Memory | None:
    """The memory of a layer; None without a cache, as in training."""
    return None if cache is None else Memory(cache, layer, slots)
