"""The endless stream of training batches: step s always holds the same samples, so training resumes exactly."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vgen.data.dataset import EpochDataset
from vgen.errors import VgenError

LARGE_BATCH = 256
log = logging.getLogger("vgen.data")


def batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict]:
    """Yields the collated batches of steps start_step, start_step + 1, … without end.

    Samples follow each other epoch by epoch, every epoch in its own order drawn from (seed, epoch); no tail is dropped, a batch may
    span two epochs. Step s of `world` processes takes the next world * batch_size samples, process `rank` its share of batch_size.
    Nothing else is state: a run that stops after step s continues with start_step = s + 1, with any number of workers, and
    with another `world` too, as long as world * batch_size stays.

    Args:
        batch_size: samples per process.
        workers: DataLoader processes (0: load in this one). The global random state is never touched.
        pin_memory: copy batches to page-locked memory (for asynchronous copies to a GPU).
    """
    if batch_size < 1 or start_step < 0 or not 0 <= rank < world:
        raise VgenError(
            f"batches need batch_size >= 1, start_step >= 0 and 0 <= rank < world, "
            f"found batch_size {batch_size}, start_step {start_step}, rank {rank}, world {world}"
        )
    if batch_size * world > len(dataset) and rank == 0:
        log.warning(
            "every step holds %d samples, and there are %d: each is in it %.3g times, which costs time and teaches nothing new; "
            "a batch_size of at most %d would do",
            batch_size * world,
            len(dataset),
            batch_size * world / len(dataset),
            max(1, len(dataset) // world),
        )
    share = getattr(dataset, "share_with_workers", None)
    if workers and share:
        share()
    plan = _Plan(len(dataset), batch_size, seed, start_step, rank, world, isinstance(dataset, EpochDataset))
    loader = DataLoader(
        dataset,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else every iterator draws a seed from the global generator
    )
    try:
        yield from loader
    finally:
        report = getattr(dataset, "report_bad_files", None)
        if report and not sys.is_finalizing():  # a stream still open at exit: torch aborts when it is used that late
            report()


def large_batch(batch_size: int, count: int) -> str:
    """A sentence where so many of `count` pictures go through a network in one call that nothing else is seen for long, else ""."""
    together = min(batch_size, count)
    if together < LARGE_BATCH:
        return ""
    return f"{together} pictures at once, as the batch size is {batch_size}: this takes much memory, and long before the first is done"


def batch_indices(
    length: int, batch_size: int, seed: int, step: int, rank: int = 0, world: int = 1
) -> list[tuple[int, int]]:
    """The (index, epoch) of every sample of one process in one step, for a dataset of `length` samples."""
    first = (step * world + rank) * batch_size
    places = (divmod(place, length) for place in range(first, first + batch_size))
    return [(int(_permutation(length, seed, epoch)[offset]), epoch) for epoch, offset in places]


def collate(items: list[dict]) -> dict:
    """Stacks tensors, turns numbers into an int64 tensor `[B]`, and keeps strings as lists."""
    batch = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if isinstance(first, Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(first, int):
            batch[name] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[name] = values
    return batch


class _Plan:
    """A DataLoader batch sampler: an endless iterable of lists of dataset addresses."""

    def __init__(self, length: int, batch_size: int, seed: int, start: int, rank: int, world: int, with_epoch: bool):
        self.arguments = (length, batch_size, seed)
        self.start, self.rank, self.world, self.with_epoch = start, rank, world, with_epoch

    def __iter__(self) -> Iterator[list]:
        step = self.start
        while True:
            addresses = batch_indices(*self.arguments, step, self.rank, self.world)
            yield addresses if self.with_epoch else [index for index, _ in addresses]
            step += 1


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64))).permutation(length)
