"""The endless batch stream: exact resume, exact division among processes."""

import logging
from itertools import chain, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vgen.data.batches import batch_indices, batches, collate, large_batch
from vgen.data.dataset import open_images
from vgen.errors import VgenError

STREAMS = {
    "length": st.integers(1, 30),
    "batch_size": st.integers(1, 12),
    "seed": st.integers(0, 2**63),
    "start": st.integers(0, 20),
    "world": st.integers(1, 4),
}


class Numbers(torch.utils.data.Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"value": index, "name": str(index), "tensor": torch.tensor([index])}


def values(*args, steps=6, **options):
    return [batch["value"].tolist() for batch in islice(batches(*args, **options), steps)]


@settings(max_examples=40, deadline=None)
@given(**STREAMS)
def test_resuming_continues_the_same_stream(length, batch_size, seed, start, world):
    data = Numbers(length)
    for rank in range(world):
        whole = values(data, batch_size, seed, 0, rank, world, steps=start + 3)
        assert values(data, batch_size, seed, start, rank, world, steps=3) == whole[start:]


@settings(max_examples=60, deadline=None)
@given(**STREAMS)
def test_processes_divide_the_global_batch(length, batch_size, seed, start, world):
    parts = [batch_indices(length, batch_size, seed, start, rank, world) for rank in range(world)]
    assert list(chain(*parts)) == batch_indices(length, batch_size * world, seed, start)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 30), batch_size=st.integers(1, 12), seed=st.integers(0, 2**63))
def test_every_epoch_is_a_permutation_without_a_dropped_tail(length, batch_size, seed):
    steps = -(-3 * length // batch_size)
    stream = list(chain(*(batch_indices(length, batch_size, seed, step) for step in range(steps))))[: 3 * length]
    for epoch in range(3):
        part = stream[epoch * length : (epoch + 1) * length]
        assert [number for _, number in part] == [epoch] * length
        assert sorted(index for index, _ in part) == list(range(length))


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(batch_indices(50, 50, seed, step)) for seed in range(3) for step in range(3)}
    assert len({tuple(index for index, _ in order) for order in orders}) == 9


def test_the_order_is_pinned():
    """Resuming must survive updates: these numbers may never change."""
    assert [index for index, _ in batch_indices(10, 12, seed=7, step=0)] == [6, 3, 9, 1, 2, 0, 5, 7, 8, 4, 1, 9]


def test_workers_change_nothing_and_leave_the_global_random_state_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    expected = values(Numbers(7), 4, 0, 2)
    assert values(Numbers(7), 4, 0, 2, workers=2) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_see_epochs_and_report_bad_files(tmp_path, caplog):
    for number in range(6):
        Image.effect_noise((20, 20), 90).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    streams = []
    for workers in (0, 2):
        data = open_images(tmp_path, size=16, augment=True)
        stream = batches(data, 4, seed=0, workers=workers)
        streams.append([next(stream) for _ in range(6)])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            stream.close()
        assert [record.getMessage() for record in caplog.records] == [
            "1 of 6 samples could not be read and were skipped: 3"
        ]
    for one, two in zip(*streams):
        assert one["key"] == two["key"] and torch.equal(one["image"], two["image"])
    by_key = [image for batch in streams[0] for key, image in zip(batch["key"], batch["image"]) if key == "0"]
    assert len(by_key) > 2 and not torch.equal(by_key[0], by_key[1])  # another view in another epoch


def test_collate():
    batch = collate([Numbers(3)[0], Numbers(3)[2]])
    assert batch["value"].tolist() == [0, 2] and batch["value"].dtype == torch.int64
    assert batch["name"] == ["0", "2"] and batch["tensor"].tolist() == [[0], [2]]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"start_step": -1}, {"rank": 2, "world": 2}])
def test_bad_arguments(options):
    with pytest.raises(VgenError, match="rank < world"):
        next(batches(Numbers(3), **{"batch_size": 2, "seed": 0} | options))


def test_a_batch_beyond_the_data_is_announced_before_the_first_step(caplog):
    with caplog.at_level(logging.WARNING, "vgen.data"):
        next(batches(Numbers(24), 1000, 0, world=2, rank=1))
        assert not caplog.messages  # one process says it
        stream = batches(Numbers(24), 1000, 0, world=2)
        next(stream)
    (message,) = caplog.messages
    assert (
        "every step holds 2000 samples, and there are 24: each is in it 83.3 times" in message
        and "at most 12" in message
    )
    caplog.clear()
    next(batches(Numbers(24), 12, 0, world=2))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("size", "count", "said"),
    [(255, 9999, ""), (9999, 255, ""), (256, 256, "256 pictures"), (9999, 300, "300 pictures")],
)
def test_a_large_batch_is_announced(size, count, said):
    assert large_batch(size, count).startswith(said) and bool(large_batch(size, count)) == bool(said)


def no_shared_memory(*args):
    raise RuntimeError("unable to open shared memory object: No such file or directory (2)")


def test_shared_memory_is_for_workers_alone(tmp_path, monkeypatch):
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_shared_memory)
    data = open_images(tmp_path, "train", 8)
    assert next(batches(data, 2, 0))["image"].shape == (2, 3, 8, 8)
    with pytest.raises(VgenError, match=r"needs shared memory \(/dev/shm\).*set data.workers=0"):
        next(batches(data, 2, 0, workers=1))
