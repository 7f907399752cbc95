"""The cache: slots by slice, by list, by row; truncation; rows."""

import torch

from vgen.layers.cache import KVCache


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


def test_truncate_and_take_rows():
    cache = KVCache(1, 2, 1, 4, 2)
    cache.write(
        0, slice(0, 4), torch.ones(2, 1, 4, 2), torch.ones(2, 1, 4, 2) * torch.tensor([1.0, 2.0])[:, None, None, None]
    )
    cache.truncate(1)
    keys, values = cache.read(0, 4)
    assert keys[:, :, 1:].abs().sum() == 0 and values[1, 0, 0, 0] == 2
    taken = cache.take_rows(torch.tensor([1, 1, 0]))
    assert taken.values[0, :, 0, 0, 0].tolist() == [2, 2, 1]
    taken.write(0, slice(0, 1), torch.zeros(3, 1, 1, 2), torch.zeros(3, 1, 1, 2))
    assert cache.values[0, 1, 0, 0, 0] == 2  # a copy


def test_truncation_forgets_keys_and_values_behind_the_length():
    cache = KVCache(2, 1, 1, 5, 3)
    for layer in range(2):
        cache.write(layer, slice(0, 5), torch.ones(1, 1, 5, 3), torch.full((1, 1, 5, 3), 2.0))
    cache.truncate(2)
    for layer in range(2):
        keys, values = cache.read(layer, 5)
        assert keys[0, 0, :, 0].tolist() == [1, 1, 0, 0, 0] and values[0, 0, :, 0].tolist() == [2, 2, 0, 0, 0]
