"""Caching the visual tokens of a dataset: every split of a folder through a frozen tokenizer, resumable, written whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vgen.data.batches import large_batch
from vgen.data.dataset import ImageDataset, open_images
from vgen.data.heldout import AUTO
from vgen.data.identity import digest, pictures_digest, weights_digest
from vgen.data.images import Augment, both_sides
from vgen.data.sources import Collection, open_data, splits_of
from vgen.data.split_files import Record, SplitFiles, check_out, complete, marked_splits
from vgen.data.splits import manifest_size
from vgen.data.token_splits import write_splits
from vgen.data.tokens import write_tokens
from vgen.errors import VgenError
from vgen.files import atomic_path, sha256, sole_user
from vgen.metrics import psnr
from vgen.tokenizers_vis.base import coded_together, to_uint8
from vgen.tokenizers_vis.registry import find_tokenizer, open_tokenizer, saved_config

PART = 4096  # pictures per part: what a kill can cost at most
CODING = 1  # raise it when the same bytes become other pixels or tokens: it is part of every cache's identity
CHECKED = 64  # pictures per part, about, that a decoder of many steps (FlexTok's) makes again


@dataclass(frozen=True)
class View:
    """One variant of every picture: the plain one, its mirror image, random view number `epoch` of an augmented dataset, or
    the part of `size` (height, width) at `corner` (row, column) of a larger picture. dataset: None where the plain pictures serve."""

    dataset: ImageDataset | None = None
    epoch: int = 0
    mirror: bool = False
    corner: tuple[int, int] | None = None
    size: tuple[int, int] = (0, 0)

    def pixels(self, index: int, plain: Tensor) -> Tensor:
        """[3, H, W] in [-1, 1]; plain: the same of the plain picture."""
        image = plain if self.dataset is None else self.dataset[index, self.epoch]["image"]
        if self.corner is not None:
            (top, left), (height, width) = self.corner, self.size
            image = image[:, top : top + height, left : left + width]
        return image.flip(-1) if self.mirror else image


@dataclass(frozen=True)
class ViewSettings:
    """Which views of the training pictures are coded (`cache_tokens` says what the fields mean)."""

    flips: bool = False
    variants: int = 0
    min_scale: float = 0.8
    ten_crop: float = 0.0

    def __post_init__(self) -> None:
        if self.variants < 0 or not 0 < self.min_scale <= 1:
            raise VgenError(
                f"expected variants >= 0 and min scale in (0, 1], found {self.variants} and {self.min_scale}"
            )
        if self.ten_crop and self.ten_crop <= 1:
            raise VgenError(
                f"ten crops are cut out of larger pictures: expected a range above 1 such as 1.1, found {self.ten_crop}"
            )

    def views(self, data: Collection, split: str, size: tuple[int, int]) -> list[View]:
        """The plain pictures, and of the training split what is asked for."""
        views = [View()]
        if split != "train":
            return views
        views += [View(mirror=True)] if self.flips else []
        if self.variants:
            flip = 0.5 if self.flips else 0.0
            augmented = open_images(data, split, size, Augment(flip=flip, min_scale=self.min_scale))
            views += [View(augmented, epoch=number) for number in range(self.variants)]
        if self.ten_crop:
            larger = int(size[0] * self.ten_crop), int(size[1] * self.ten_crop)
            views += ten_crops(open_images(data, split, larger), larger, size)
        return views


def ten_crops(pictures: ImageDataset, larger: tuple[int, int], size: tuple[int, int]) -> list[View]:
    """The four corners and the centre of pictures of `larger` height and width, cut to `size`, and their mirror images (LlamaGen's data)."""
    bottom, right = larger[0] - size[0], larger[1] - size[1]
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return [View(pictures, mirror=mirror, corner=corner, size=size) for mirror in (False, True) for corner in corners]


@dataclass(frozen=True)
class SplitReport:
    """What caching one split found. psnr: mean over the plain pictures that were decoded again (dB; None: none was); tokens: a
    sentence about them."""

    split: str
    images: int
    variants: int
    skipped: int
    psnr: float | None
    tokens: str
    path: str

    def __str__(self) -> str:
        views = f" x {self.variants} views" if self.variants > 1 else ""
        skipped = f", {self.skipped} unreadable pictures skipped" if self.skipped else ""
        trip = "" if self.psnr is None else f"round trip {self.psnr:.2f} dB; "
        count = f"{self.images} picture{'s' * (self.images != 1)}"
        return f"{self.split}: {count}{views}{skipped}; {trip}{self.tokens}; {self.path}"


def cache_tokens(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    flips: bool = False,
    variants: int = 0,
    min_scale: float = 0.8,
    ten_crop: float = 0.0,
    low_res: int | tuple[int, int] = 0,
    held_out: str | int | None = AUTO,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = print,
) -> list[SplitReport]:
    """Writes `out/SPLIT.safetensors` and `.json` (`vgen.data.tokens.TokenDataset`) for every split of `data`.

    size: side in pixels, or height and width (None: what the dataset's manifest says); flips: add the mirror image of every training picture; variants:
    add so many random crops of at least `min_scale` of a side (mirrored at random with `flips`); ten_crop: add the ten crops of
    the pictures at so many times `size` (0: none; the released LlamaGen, PAR, NAR and RAR: 1.1). Other splits stay plain.
    low_res: of continuous tokenizers, add the latents of every view at this size (0: none; Hi-MAR: half). held_out: how many training
    pictures become the split "heldout" ("5%", 200, AUTO; None: as the data is), see `open_data`.

    A finished split stays while the bytes of its pictures, the tokenizer and the settings stay; where only captions, labels, keys or
    class names changed, these are written anew and the tokens stay. What changed is made again, splits that `data` does not have are
    removed, and an interrupted split continues after its last part. Files that vgen did not write are in the way: VgenError.
    """
    if batch_size < 1:
        raise VgenError(f"expected a batch size >= 1, found {batch_size}")
    settings = ViewSettings(flips, variants, min_scale, ten_crop)
    out = Path(out)
    size = size or manifest_size(data)
    if size is None:
        raise VgenError(
            f"{data} has no manifest.json that names an image size; give the side that the tokenizer was trained with, such as --size 64"
        )
    check_out(out, splits_of(data, held_out))
    folder = find_tokenizer(model)
    tokenizer = open_tokenizer(folder)
    size, low = both_sides(size), both_sides(low_res) if low_res else None
    tokenizer.spec.grid(*size)
    if low:
        if tokenizer.spec.vocabulary is not None:
            raise VgenError(
                f"smaller pictures are for continuous tokenizers, and {folder} makes codes; leave --low-res out"
            )
        if not all(0 < small < side for small, side in zip(low, size)):
            most, found = (_written(side - 1 for side in size), _written(low))
            raise VgenError(f"the smaller pictures have 1 to {most} pixels a side, got --low-res {found}")
        tokenizer.spec.grid(*low)
    tokenizer.to(device)
    coding = Coding(Coder(tokenizer, low), folder, weights_digest(folder), saved_config(folder), size)
    collection = open_data(data, held_out)
    say(str(collection.report))
    with sole_user(out, "tokenizing"):
        return _cache_splits(coding, collection, out, settings, batch_size, say)


def _cache_splits(
    coding: Coding, data: Collection, out: Path, settings: ViewSettings, batch_size: int, say: Callable[[str], None]
) -> list[SplitReport]:
    reports, sidecars = [], {}
    for split in data.splits:
        dataset, views = open_images(data, split, coding.size), settings.views(data, split, coding.size)
        if note := large_batch(batch_size, min(PART, len(dataset))):
            say(f"{split}: {note}")
        record, news = coding.cache(SplitFiles(out, split), dataset, views, settings, batch_size)
        sidecars[split] = record.sidecar_sha256
        reports.append(SplitReport(**record.report))
        say(f"{reports[-1]}{news}")
    write_splits(out, sidecars)
    for files in marked_splits(out):
        if files.split not in data.splits:
            files.remove()
            files.remove_parts()
            say(f"{files.split}: {data.path} has no such split, its old tokens are removed")
    return reports


@dataclass(frozen=True)
class Coder:
    """What is cached of a picture: codes, or the moments of latents, also of the picture made smaller (low_res, height and width; None: not)."""

    tokenizer: ModelMixin
    low_res: tuple[int, int] | None = None

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> the tensors of a token set (vgen/data/tokens.py), a row a picture."""
        if self.tokenizer.spec.vocabulary is not None:
            return {"tokens": self.tokenizer.encode(pixels)}
        # Latents would differ with the batch size in their last bits, as codes do not.
        count = len(pixels)
        parts = [self._of_latents(pixels[rows]) for rows in coded_together(self.tokenizer, count, pixels.shape[-2:])]
        return {key: torch.cat([part[key] for part in parts])[:count] for key in parts[0]}

    def _of_latents(self, pixels: Tensor) -> dict[str, Tensor]:
        found = self._latents(pixels, "tokens", "deviations")
        if self.low_res:
            small = F.interpolate(pixels, self.low_res, mode="bicubic")  # no antialias, as Hi-MAR
            found |= self._latents(small, "low", "low_deviations")
        return found

    def _latents(self, pixels: Tensor, mean: str, deviation: str) -> dict[str, Tensor]:
        if not hasattr(self.tokenizer, "moments"):
            return {mean: self.tokenizer.encode(pixels)}
        return dict(zip((mean, deviation), self.tokenizer.moments(pixels)))

    def checked(self, before: int) -> bool:
        """Whether pictures are decoded again to tell the quality, if so many of their part were before them.

        Not where the decoder reads captions (TA-TiTok), and only some where it is costly.
        """
        config = self.tokenizer.config
        return not config.get("text_tokens") and (before < CHECKED or "steps" not in config)

    def round_trip(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """psnr [B] of the pictures decoded again, in dB. tokens: what is cached of them; levels of channels are not, but their latents."""
        spec = self.tokenizer.spec
        tokens = tokens if spec.levels is None else self.tokenizer.encode(pixels)
        size = pixels.shape[-2:]
        decoded = self.tokenizer.decode(tokens, grid=spec.grid(*size), **spec.size_options(*size))
        return psnr(to_uint8(pixels), to_uint8(decoded)).float().cpu()

    def describe(self, tensors: Mapping[str, Tensor]) -> str:
        """The codes in use, or mean and standard deviation of the latents."""
        tokens, vocabulary = tensors["tokens"], self.tokenizer.spec.vocabulary
        if vocabulary is None:
            variance = tokens.float().var()
            if "deviations" in tensors:
                variance = variance + tensors["deviations"].float().square().mean()
            return f"latents of mean {tokens.float().mean():.2f} and standard deviation {variance.sqrt():.2f}"
        counts = torch.bincount(tokens.flatten().long(), minlength=vocabulary).double()
        perplexity = math.exp(torch.special.entr(counts / counts.sum()).sum())
        return f"{int((counts > 0).sum())} of {vocabulary} codes in use (perplexity {perplexity:.0f})"


@dataclass(frozen=True)
class Coding:
    """A frozen tokenizer, where it comes from, and the size (height, width) at which it sees pictures."""

    encode: Coder
    folder: Path
    digest: str
    config: Mapping[str, Any]
    size: tuple[int, int]

    def cache(
        self,
        files: SplitFiles,
        dataset: ImageDataset,
        views: Sequence[View],
        settings: ViewSettings,
        batch_size: int,
    ) -> tuple[Record, str]:
        """Makes the files of a split, or as much of them as changed. Returns their record, and in words what stayed ("": nothing)."""
        seen = asdict(settings) if len(views) > 1 else None
        identity = digest(
            CODING,
            self.digest,
            self.config,
            _side(self.size),
            _side(self.encode.low_res),
            seen,
            pictures_digest(dataset.source, files.split),
        )
        found = files.record()
        if found is None or found.identity != identity or not files.intact(found):
            return self._make(files, dataset, views, identity, batch_size), ""
        description = digest(self._description(dataset, found.unreadable))
        if found.description == description:
            record = replace(found, report={**found.report, "path": str(files.tokens)})
            return record, " (kept: same pictures, captions, tokenizer and settings)"
        report = {**found.report, "path": str(files.tokens)}
        record = self._write(files, dataset, load_file(files.tokens), identity, found.unreadable, report)
        return (
            record,
            " (tokens kept: same pictures, tokenizer and settings; captions, labels and class names written anew)",
        )

    def _make(
        self, files: SplitFiles, dataset: ImageDataset, views: Sequence[View], identity: str, batch_size: int
    ) -> Record:
        parts = files.parts(identity)
        files.remove_parts(keep=parts)
        parts.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(dataset), PART)
        with tqdm(total=len(dataset), desc=files.split, unit="image", disable=None) as bar:
            for start in starts:
                stop = min(start + PART, len(dataset))
                path = parts / f"{start:09d}.safetensors"
                if complete(path):
                    bar.update(stop - start)
                    continue
                part = _encode(self.encode, dataset, views, range(start, stop), batch_size, bar)
                with atomic_path(path) as temporary:
                    save_file(part, temporary)
        loaded = [load_file(parts / f"{start:09d}.safetensors") for start in starts]
        names = dict.fromkeys(key for part in loaded for key in part)  # a part without readable pictures has no tokens
        whole = {key: torch.cat([part[key] for part in loaded if key in part]) for key in names}
        indices, quality = whole.pop("index").tolist(), whole.pop("psnr")
        tensors = whole if len(views) > 1 else {key: part[:, 0] for key, part in whole.items()}
        report = SplitReport(
            split=files.split,
            images=len(indices),
            variants=len(views),
            skipped=len(dataset) - len(indices),
            psnr=quality.mean().item() if len(quality) else None,
            tokens=self.encode.describe(whole),
            path=str(files.tokens),
        )
        unreadable = sorted(set(range(len(dataset))) - set(indices))
        record = self._write(files, dataset, tensors, identity, unreadable, asdict(report))
        files.remove_parts()
        return record

    def _write(
        self,
        files: SplitFiles,
        dataset: ImageDataset,
        tensors: Mapping[str, Tensor],
        identity: str,
        unreadable: Sequence[int],
        report: Mapping[str, Any],
    ) -> Record:
        spec, low = self.encode.tokenizer.spec, self.encode.low_res
        description = self._description(dataset, unreadable)
        files.write(
            Record(identity)
        )  # from here on the files are ours, and nothing vouches for them before they are whole
        sidecar = write_tokens(
            files.tokens,
            tensors["tokens"],
            grid=spec.grid(*self.size),
            vocabulary=spec.vocabulary,
            tokenizer_sha256=self.digest,
            tokenizer_config=self.config,
            low_grid=spec.grid(*low) if low else None,
            size=spec.size_options(*self.size).get("size"),
            more={key: part for key, part in tensors.items() if key != "tokens"},
            **description,
        )
        record = Record(identity, digest(description), sidecar, sha256(files.tokens), list(unreadable), dict(report))
        files.write(record)
        return record

    def _description(self, dataset: ImageDataset, unreadable: Sequence[int]) -> dict[str, Any]:
        """What is said about the pictures that have tokens."""
        gaps = set(unreadable)
        kept = [index for index in range(len(dataset)) if index not in gaps]
        aesthetics = [] if all(map(math.isnan, dataset.aesthetics)) else [dataset.aesthetics[i] for i in kept]
        return {
            "captions": [dataset.captions[i] for i in kept],
            "labels": [dataset.labels[i] for i in kept],
            "keys": [dataset.keys[i] for i in kept],
            "class_names": list(dataset.class_names),
            "aesthetics": aesthetics,
            "tokenizer": str(self.folder),
        }


@torch.no_grad()
def _encode(
    encode: Coder, dataset: ImageDataset, views: Sequence[View], indices: range, batch_size: int, bar: tqdm
) -> dict[str, Tensor]:
    """What `encode` gives, [M, A, …] each; psnr of those plain views that were decoded again; index [M] of the readable pictures."""
    rows: dict[str, list[Tensor]] = {}
    quality, kept = [], []
    for start in range(0, len(indices), batch_size):
        wanted = indices[start : start + batch_size]
        items = {i: dataset.own_item(i) for i in wanted}
        readable = {i: item["image"] for i, item in items.items() if item is not None}
        bar.update(len(wanted))
        if not readable:
            continue
        found = []
        for number, view in enumerate(views):
            pixels = torch.stack([view.pixels(i, plain) for i, plain in readable.items()]).to(encode.tokenizer.device)
            found.append(encode(pixels))
            if number == 0 and encode.checked(start):
                quality.append(encode.round_trip(pixels, found[0]["tokens"]))
        for key in found[0]:
            stacked = torch.stack([part[key] for part in found], dim=1).cpu()
            rows.setdefault(key, []).append(stacked if stacked.is_floating_point() else stacked.to(torch.int32))
        kept += list(readable)
    index = torch.tensor(kept, dtype=torch.int64)
    return {
        **{key: torch.cat(parts) for key, parts in rows.items()},
        "psnr": torch.cat([torch.empty(0), *quality]),
        "index": index,
    }


def _side(size: tuple[int, int] | None) -> int | tuple[int, int]:
    """A size as identities have it: the side of a square (they knew no others), 0 for none."""
    if size is None:
        return 0
    return size[0] if size[0] == size[1] else size


def _written(size: Iterable[int]) -> str:
    """'31' for a square, else '31x63'."""
    return "x".join(map(str, dict.fromkeys(size)))
