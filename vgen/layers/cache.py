"""The key/value cache: preallocated, addressed by slot, overwritable, truncatable. Keys are stored after RoPE.

Masks do not live here: which slots a query may see belongs to the model's plan.
"""

from __future__ import annotations

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

    def truncate(self, length: int) -> None:
        """Forgets every slot from `length` on (their contents become zero again)."""
        self.keys[:, :, :, length:] = 0
        self.values[:, :, :, length:] = 0

    def take_rows(self, index: Tensor) -> KVCache:
        """A cache with the given rows: tiling to guidance rows, dropping finished samples, reordering."""
        taken = object.__new__(KVCache)
        taken.keys = self.keys.index_select(1, index)
        taken.values = self.values.index_select(1, index)
        return taken
