"""Caching the visual tokens of a dataset: every split of a folder through a frozen tokenizer, resumable, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vgen.data.dataset import ImageDataset, open_images
from vgen.data.images import Augment
from vgen.data.sources import splits_of
from vgen.data.tokens import write_tokens
from vgen.errors import VgenError
from vgen.files import atomic_path, sha256, write_json
from vgen.samplers.types import grid_size
from vgen.tokenizers_vis.base import to_uint8
from vgen.tokenizers_vis.registry import find_tokenizer, open_tokenizer
from vgen.train.metrics import psnr

PART = 4096  # pictures per part: what a kill can cost at most


@dataclass(frozen=True)
class View:
    """One variant of every picture: the plain one, its mirror image, random view number `epoch` of an augmented dataset, or
    the square of side `size` at `corner` (row, column) of a larger picture."""

    dataset: ImageDataset
    epoch: int = 0
    mirror: bool = False
    corner: tuple[int, int] | None = None
    size: int = 0

    def pixels(self, index: int) -> Tensor:
        """[3, size, size] in [-1, 1]."""
        image = self.dataset[index, self.epoch]["image"]
        if self.corner is not None:
            top, left = self.corner
            image = image[:, top : top + self.size, left : left + self.size]
        return image.flip(-1) if self.mirror else image


def ten_crops(larger: ImageDataset, side: int, size: int) -> list[View]:
    """The four corners and the centre of pictures of `side` pixels, cut to `size`, and their mirror images (LlamaGen's data)."""
    far, middle = side - size, round((side - size) / 2)
    corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    return [View(larger, mirror=mirror, corner=corner, size=size) for mirror in (False, True) for corner in corners]


@dataclass(frozen=True)
class SplitReport:
    """What caching one split found. psnr: mean over the plain pictures, decoded again (dB); used, perplexity: of the codes."""

    split: str
    images: int
    variants: int
    skipped: int
    psnr: float
    used: int
    perplexity: float
    vocabulary: int
    path: str

    def __str__(self) -> str:
        views = f" x {self.variants} views" if self.variants > 1 else ""
        skipped = f", {self.skipped} unreadable pictures skipped" if self.skipped else ""
        return (
            f"{self.split}: {self.images} pictures{views}{skipped}; round trip {self.psnr:.2f} dB; {self.used} of {self.vocabulary} codes "
            f"in use (perplexity {self.perplexity:.0f}); {self.path}"
        )


def cache_tokens(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    flips: bool = False,
    variants: int = 0,
    min_scale: float = 0.8,
    ten_crop: float = 0.0,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = print,
) -> list[SplitReport]:
    """Writes `out/SPLIT.safetensors` and `.json` (`vgen.data.tokens.TokenDataset`) for every split of `data`.

    size: side in pixels (None: what the dataset's manifest says); flips: add the mirror image of every training picture; variants:
    add so many random crops of at least `min_scale` of a side (mirrored at random with `flips`); ten_crop: add the ten crops of
    the pictures at so many times `size` (0: none; the released LlamaGen, PAR, NAR and RAR: 1.1). Other splits stay plain. Finished
    splits of the same tokenizer, data and settings are kept; an interrupted split continues after its last part.
    """
    if batch_size < 1 or variants < 0 or not 0 < min_scale <= 1:
        raise VgenError(
            f"expected batch size >= 1, variants >= 0 and min scale in (0, 1], found {batch_size}, {variants} and {min_scale}"
        )
    if ten_crop and ten_crop <= 1:
        raise VgenError(
            f"ten crops are cut out of larger pictures: expected a range above 1 such as 1.1, found {ten_crop}"
        )
    data, out = Path(data), Path(out)
    if out.is_file():
        raise VgenError(f"{out} is a file, expected a folder to write")
    size = size or _manifest_size(data)
    folder = find_tokenizer(model)
    tokenizer = open_tokenizer(folder)
    if tokenizer.spec.vocabulary is None:
        raise VgenError(f"{folder} is a continuous tokenizer and has no codes to cache; name a discrete one")
    tokenizer.spec.grid(size, size)
    tokenizer.to(device)
    digest = sha256(folder / SAFETENSORS_WEIGHTS_NAME)
    reports = []
    for split in splits_of(data):
        plain = open_images(data, split, size)
        views = [View(plain)]
        if split == "train":
            augmented = open_images(data, split, size, Augment(flip=0.5 if flips else 0.0, min_scale=min_scale))
            views += [View(plain, mirror=True)] if flips else []
            views += [View(augmented, epoch=number) for number in range(variants)]
            if ten_crop:
                side = int(size * ten_crop)
                views += ten_crops(open_images(data, split, side), side, size)
        settings = [digest, str(data.resolve()), split, size, flips, variants, min_scale, ten_crop, plain.keys]
        identity = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        report = _finished(out, split, identity)
        if report is None:
            report = _cache_split(tokenizer, folder, digest, plain, views, out, split, size, identity, batch_size)
            write_json(_report_path(out, split), {"identity": identity, **asdict(report)})
        reports.append(report)
        say(str(report))
    return reports


def _report_path(out: Path, split: str) -> Path:
    return out / f"{split}.report.json"


def _finished(out: Path, split: str, identity: str) -> SplitReport | None:
    """The report of a split that is already there, made from the same tokenizer, data and settings."""
    path = _report_path(out, split)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    complete = record.pop("identity") == identity and Path(record["path"]).is_file()
    return SplitReport(**record) if complete else None


def _cache_split(
    tokenizer: ModelMixin,
    folder: Path,
    digest: str,
    dataset: ImageDataset,
    views: Sequence[View],
    out: Path,
    split: str,
    size: int,
    identity: str,
    batch_size: int,
) -> SplitReport:
    parts = out / f".{split}-{identity[:16]}"  # another tokenizer, other data or settings: another folder
    for old in out.glob(f".{split}-*") if out.is_dir() else ():
        if old != parts:
            shutil.rmtree(old, ignore_errors=True)
    parts.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(dataset), PART)
    with tqdm(total=len(dataset), desc=split, unit="image", disable=None) as bar:
        for start in starts:
            stop = min(start + PART, len(dataset))
            path = parts / f"{start:09d}.safetensors"
            if not path.is_file():
                part = _encode(tokenizer, dataset, views, range(start, stop), batch_size, bar)
                with atomic_path(path) as temporary:
                    save_file(part, temporary)
            else:
                bar.update(stop - start)
    loaded = [load_file(parts / f"{start:09d}.safetensors") for start in starts]
    whole = {key: torch.cat([part[key] for part in loaded]) for key in ("tokens", "psnr", "index")}
    indices = whole["index"].tolist()
    target = out / f"{split}.safetensors"
    _report_path(out, split).unlink(missing_ok=True)  # the old report must not vouch for half-written new files
    write_tokens(
        target,
        whole["tokens"] if len(views) > 1 else whole["tokens"][:, 0],
        captions=[dataset.captions[i] for i in indices],
        labels=[dataset.labels[i] for i in indices],
        keys=[dataset.keys[i] for i in indices],
        grid=tokenizer.spec.grid(size, size),
        vocabulary=tokenizer.spec.vocabulary,
        tokenizer=str(folder),
        tokenizer_sha256=digest,
        class_names=dataset.class_names,
    )
    shutil.rmtree(parts)
    counts = torch.bincount(whole["tokens"].flatten().long(), minlength=tokenizer.spec.vocabulary).double()
    perplexity = math.exp(torch.special.entr(counts / counts.sum()).sum())
    return SplitReport(
        split=split,
        images=len(indices),
        variants=len(views),
        skipped=len(dataset) - len(indices),
        psnr=whole["psnr"].mean().item(),
        used=int((counts > 0).sum()),
        perplexity=perplexity,
        vocabulary=tokenizer.spec.vocabulary,
        path=str(target),
    )


@torch.no_grad()
def _encode(
    tokenizer: ModelMixin, dataset: ImageDataset, views: Sequence[View], indices: range, batch_size: int, bar: tqdm
) -> dict[str, Tensor]:
    """tokens [M, A, N] int32, psnr [M] of the plain view, index [M] of the readable pictures."""
    # A dataset replaces an unreadable picture by the next readable one: its key tells.
    tokens, quality, kept = [], [], []
    for start in range(0, len(indices), batch_size):
        wanted = indices[start : start + batch_size]
        readable = [i for i in wanted if dataset[i]["key"] == dataset.keys[i]]
        bar.update(len(wanted))
        if not readable:
            continue
        codes = []
        for number, view in enumerate(views):
            pixels = torch.stack([view.pixels(i) for i in readable]).to(tokenizer.device)
            codes.append(tokenizer.encode(pixels))
            if number == 0:
                grid = tokenizer.spec.grid(*pixels.shape[-2:])
                quality.append(psnr(to_uint8(pixels), to_uint8(tokenizer.decode(codes[0], grid=grid))).float().cpu())
        tokens.append(torch.stack(codes, dim=1).to("cpu", torch.int32))
        kept += readable
    count = grid_size(tokenizer.spec.grid(dataset.size, dataset.size))
    empty = torch.empty(0, len(views), count, dtype=torch.int32)
    return {
        "tokens": torch.cat([empty, *tokens]),
        "psnr": torch.cat([torch.empty(0), *quality]),
        "index": torch.tensor(kept, dtype=torch.int64),
    }


def _manifest_size(data: Path) -> int:
    path = data / "manifest.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["image_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VgenError(f"{data} has no manifest.json that names an image size; give it with --size") from error
