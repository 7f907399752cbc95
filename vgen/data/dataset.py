"""Image-caption-class datasets with exact, reproducible items."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vgen.data.identity import digest
from vgen.data.images import Augment, BadFile, both_sides, decode_image, item_generator, shrink, view
from vgen.data.sources import Collection, Source, open_source
from vgen.errors import VgenError

log = logging.getLogger("vgen.data")


class EpochDataset(Dataset):
    """A dataset whose items may differ from epoch to epoch, as a pure function of (index, epoch).

    `dataset[index]` is the item of epoch 0; `dataset[index, epoch]` (what `batches` asks for) that of any epoch.
    """

    def item(self, index: int, epoch: int) -> dict:
        raise NotImplementedError

    def __getitem__(self, address: int | tuple[int, int]) -> dict:
        index, epoch = address if isinstance(address, tuple) else (address, 0)
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")  # IndexError is what ends `for item in dataset`
        return self.item(index % len(self), epoch)


class ImageDataset(EpochDataset):
    """Items: `image` float32 [3, H, W] in [-1, 1] of `size` (a side, or H and W), `caption` str, `label` int (-1: none), `key` str.

    Shards are indexed once (offsets of all members), so every item is one seek: any order is possible, and training that resumes at
    step s sees exactly the data it would have seen. A file that cannot be read is replaced by the next readable one, always the
    same; bad files are counted across DataLoader workers and reported once by `report_bad_files` (which `batches` calls at its end).
    """

    def __init__(
        self,
        source: Source,
        size: int | tuple[int, int],
        augment: Augment | None = None,
        seed: int = 0,
        cache: bool = False,
    ):
        self.source, self.size, self.augment, self.seed = source, size, augment, seed
        self._cache: dict[int, Tensor] | None = {} if cache else None
        self._bad = torch.zeros(len(source.keys), dtype=torch.bool)
        self._reported = 0
        self.item(0, 0)  # finds out now, not in a worker later, that nothing at all is readable

    def __len__(self) -> int:
        return len(self.source.keys)

    @property
    def kind(self) -> str:
        return self.source.kind

    @property
    def keys(self) -> list[str]:
        return self.source.keys

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by label; empty when the data has none."""
        return self.source.class_names

    @cached_property
    def captions(self) -> list[str]:
        """The captions of all samples, by index ("" where there is none)."""
        return [sample.caption for sample in self.source.samples]

    @property
    def labels(self) -> list[int]:
        """The labels of all samples, by index (-1: none)."""
        return self.source.labels

    @cached_property
    def aesthetics(self) -> list[float]:
        """The aesthetic scores of all samples, by index (NaN: not known)."""
        return [sample.aesthetic for sample in self.source.samples]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of keys, captions and labels: which pictures these are. A picture painted over under its old name is not
        noticed: reading all of them before every training would take too long."""
        return digest(self.keys, self.captions, self.labels, self.class_names)

    @property
    def bad_files(self) -> list[str]:
        """Keys of the samples found unreadable so far."""
        return [self.keys[index] for index in self._bad.nonzero().flatten().tolist()]

    def item(self, index: int, epoch: int) -> dict:
        for step in range(len(self)):
            item = self.own_item((index + step) % len(self), epoch)
            if item is not None:
                return item
        raise VgenError(
            f"none of the {len(self)} pictures can be read, beginning with {self.keys[0]}: are they pictures?"
        )

    def own_item(self, index: int, epoch: int = 0) -> dict | None:
        """The item of an index without a substitute: None where its picture cannot be read."""
        image = self._load(index)
        return None if image is None else self._finish(index, epoch, image)

    def readable(self) -> Iterator[dict]:
        """Every readable item once, in order, without substitutes: for caching tokens, evaluation, contact sheets."""
        return filter(None, map(self.own_item, range(len(self))))

    def share_with_workers(self) -> None:
        """Bad files that a DataLoader worker finds are known here and to the other workers, too. Raises VgenError where this machine
        has no shared memory (containers often have little or none in /dev/shm)."""
        try:
            self._bad.share_memory_()
        except (OSError, RuntimeError) as error:
            raise VgenError(
                f"loading pictures in several processes needs shared memory (/dev/shm), and there is none to be had ({error}); "
                "set data.workers=0, or give the container some (docker run --shm-size=1g)"
            ) from error

    def report_bad_files(self) -> None:
        """Logs, once per number of bad files, how many were skipped and which."""
        bad = self.bad_files
        if len(bad) > self._reported:
            self._reported = len(bad)
            names = ", ".join(bad[:5]) + (", …" if len(bad) > 5 else "")
            log.warning("%d of %d samples could not be read and were skipped: %s", len(bad), len(self), names)

    def _load(self, index: int) -> Tensor | None:
        """The uint8 picture, or None for a bad file."""
        if self._bad[index]:
            return None
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        for picture in self.source.samples[index].pictures:
            try:
                image = shrink(decode_image(picture.read()), self.size, self.augment)
            except (BadFile, OSError):
                continue
            if self._cache is not None:
                self._cache[index] = image
            return image
        self._bad[index] = True
        return None

    def _finish(self, index: int, epoch: int, image: Tensor) -> dict:
        generator = item_generator(self.seed, epoch, index) if self.augment else None
        sample = self.source.samples[index]
        image = view(image, self.size, self.augment, generator)
        return {"image": image, "caption": sample.caption, "label": self.labels[index], "key": sample.key}


def open_images(
    path: str | Path | Collection,
    split: str = "train",
    size: int | tuple[int, int] = 64,
    augment: bool | Augment = False,
    *,
    held_out: str | int | None = None,
    seed: int = 0,
    cache: bool = False,
) -> ImageDataset:
    """Opens an image folder or WebDataset shards.

    Args:
        path: a folder of pictures (class = subfolder), a folder of shards, one .tar, a pattern (`d/*.tar`) or a range of them
            (`d/train-{000..009}.tar`), or what `open_data` made of one (reads it once for several splits).
        split: "train", "heldout"… : shards that name it or the subfolder of that name; undivided data is all "train".
        size: side of the square images in pixels, or (height, width); pictures are resized to cover it and cropped at the centre.
        augment: random crops and flips (`Augment` to set them); drawn from (seed, epoch, index), so items are reproducible.
        held_out: makes a split "heldout" of data that has none: a share ("5%"), a number of pictures, or "auto" (see `open_data`).
        seed: of the augmentation.
        cache: keep decoded pictures (uint8) in memory, per process: for small data that is read many times.

    Raises VgenError when the path, the split, the shards or all pictures are unusable.
    """
    if min(both_sides(size)) < 1:
        raise VgenError(f"the image size must be at least 1 pixel, found {size}")
    augment = Augment() if augment is True else augment or None
    if augment and not (0 < augment.min_scale <= 1 and 0 <= augment.flip <= 1):
        raise VgenError(
            f"augmentation needs 0 < min_scale <= 1 and 0 <= flip <= 1, found {augment.min_scale} and {augment.flip}"
        )
    return ImageDataset(open_source(path, split, held_out), size, augment, seed, cache)
