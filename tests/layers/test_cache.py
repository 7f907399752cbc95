"""The cache: slots by slice, by list, by row; extending."""

import torch

from vgen.layers.cache import KVCache, Memory, remember


def test_slots_may_be_a_slice_a_list_or_one_list_a_row():
    cache = KVCache(layers=2, rows=2, heads=1, slots=6, head_dim=3)
    keys, values = torch.randn(2, 2, 1, 2, 3)
    cache.write(1, slice(0, 2), keys, values)
    cache.write(1, torch.tensor([5, 3]), keys, values)
    k, v = cache.read(1, 6)
    assert torch.equal(k[:, :, :2], keys) and torch.equal(v[:, :, [5, 3]], values)
    cache.write(1, torch.tensor([[0, 4], [4, 1]]), keys, values)  # overwrites
    k, _ = cache.read(1, 6)
    assert torch.equal(k[1, :, [4, 1]], keys[1]) and torch.equal(k[0, :, [0, 4]], keys[0])
    assert cache.read(0, 6)[0].abs().sum() == 0


def test_extending_is_writing_and_then_reading_what_is_there():
    cache, (keys, values) = KVCache(layers=2, rows=1, heads=1, slots=5, head_dim=2), torch.randn(2, 1, 1, 2, 2)
    first, _ = cache.extend(1, slice(0, 2), keys, values)  # up to the end of the slice
    assert torch.equal(first, keys)
    k, v = Memory(cache, 1, torch.tensor([4, 3]), length=5).extend(keys, values)
    assert torch.equal(k[:, :, [0, 1, 4, 3]], torch.cat((keys, keys), dim=2)) and v[:, :, 2].abs().sum() == 0
    assert cache.read(0, 5)[0].abs().sum() == 0
    assert remember(None, 0, slice(0, 1)) is None and remember(cache, 1, slice(2, 3)) == Memory(cache, 1, slice(2, 3))
