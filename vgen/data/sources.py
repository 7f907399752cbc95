"""Where samples come from: what lies at a path, split by split, with one numbering of the classes and a report.

Nothing is decoded here and no file stays open, so sources can be sent to DataLoader workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from vgen.data.folders import read_folders
from vgen.data.heldout import AUTO, HELD_OUT, check_held_out, choose
from vgen.data.labels import Numbering, of_folders, of_labels, of_manifest
from vgen.data.report import DataReport, SplitContents
from vgen.data.samples import Sample, Tally
from vgen.data.shard_samples import read_shards
from vgen.data.splits import FOLDER, Layout, find_split, layout
from vgen.data.tree import IMAGE_SUFFIXES
from vgen.errors import VgenError

# The split that `held_out` makes.
HELD_OUT_SPLIT = "heldout"


@dataclass(frozen=True)
class Source:
    """One split. samples: as read; labels: their classes by number, -1 for none; class_names: of all splits of the data, by number."""

    kind: str
    samples: Sequence[Sample]
    labels: list[int]
    class_names: tuple[str, ...]

    @cached_property
    def keys(self) -> list[str]:
        return [sample.key for sample in self.samples]

    def part(self, indices: Sequence[int]) -> Source:
        """Some of the samples, in the order of their indices."""
        samples, labels = ([values[index] for index in indices] for values in (self.samples, self.labels))
        return Source(self.kind, samples, labels, self.class_names)


@dataclass(frozen=True)
class Collection:
    """All splits of the data at a path, each with at least one sample, and what was found there."""

    path: str
    sources: Mapping[str, Source]
    report: DataReport

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.sources)

    def source(self, split: str) -> Source:
        """Raises VgenError for a split that does not exist, listing those that do."""
        return self.sources[find_split(split, self.splits, self.path)]


def open_data(path: str | Path, held_out: str | int | None = None) -> Collection:
    """Everything at a path (see `layout`).

    held_out: None: the splits that the data names ("train" alone where it names none). A share ("5%") or a number of pictures: so
    many of "train" become the split "heldout", chosen by their keys. AUTO: HELD_OUT of them, where there is one split only.

    Raises VgenError when there is nothing to read, when a split holds no picture, or for a `held_out` that cannot be.
    """
    where = layout(path)
    if where.kind == FOLDER:
        samples, tallies, notes = read_folders(where)
    else:
        read = {split: read_shards(shards) for split, shards in where.parts.items()}
        samples = {split: found for split, (found, _) in read.items()}
        tallies, notes = {split: tally for split, (_, tally) in read.items()}, []
    _refuse_empty(where, samples, tallies)
    numbering = _numbering(where, samples)
    sources = {}
    for split, found in samples.items():
        labels = [numbering.number(sample.label) for sample in found]
        for sample, label in zip(found, labels):
            if label < 0 and sample.label is not None:
                tallies[split].unlabel(f"labels that are not among {numbering.source}", sample.key)
        sources[split] = Source(where.kind, found, labels, numbering.names)
    splits, made = _planned(where, held_out)
    if made:
        sources, tallies = _divided(sources, tallies, held_out)
        share = HELD_OUT if held_out == AUTO else held_out
        notes = [
            *notes,
            f"no split {HELD_OUT_SPLIT} in the data: {share} of the pictures are held out, chosen by their keys",
        ]
    sources = {split: sources[split] for split in splits}
    _note_unknown_classes(sources, tallies)
    report = DataReport(
        path=str(path),
        kind=where.kind,
        splits=tuple(_contents(split, source, tallies[split]) for split, source in sources.items()),
        classes=len(numbering.names),
        classes_from=numbering.source if numbering.names else "",
        notes=(*where.notes, *notes),
    )
    return Collection(str(path), sources, report)


def open_source(path: str | Path | Collection, split: str = "train", held_out: str | int | None = None) -> Source:
    """One split of a path, or of what `open_data` opened. Raises VgenError as `open_data` does, and for an unknown split."""
    if isinstance(path, Collection):
        return path.source(split)
    splits = splits_of(path, held_out)
    find_split(split, splits, path)  # before anything is read
    return open_data(path, held_out).source(split)


def splits_of(path: str | Path, held_out: str | int | None = None) -> tuple[str, ...]:
    """The splits of `open_data`, without reading the samples. Raises VgenError as it does."""
    return _planned(layout(path), held_out)[0]


def _planned(where: Layout, held_out: str | int | None) -> tuple[tuple[str, ...], bool]:
    """The splits, and whether `heldout` is to be made."""
    if held_out is None or (held_out == AUTO and len(where.splits) > 1):
        return where.splits, False
    if held_out != AUTO:
        check_held_out(held_out)
    if held_out == AUTO and where.splits != ("train",):
        return where.splits, False
    if HELD_OUT_SPLIT in where.splits:
        raise VgenError(
            f"{where.path} has a split {HELD_OUT_SPLIT} already, so that held_out={held_out} cannot make one: leave it out"
        )
    find_split("train", where.splits, where.path)
    return ("train", HELD_OUT_SPLIT, *(split for split in where.splits if split != "train")), True


def _divided(
    sources: Mapping[str, Source], tallies: Mapping[str, Tally], held_out: str | int
) -> tuple[dict[str, Source], dict[str, Tally]]:
    """`train` without the pictures of `heldout`, and `heldout`."""
    whole = sources["train"]
    chosen = choose(whole.keys, HELD_OUT if held_out == AUTO else held_out)
    rest = [index for index in range(len(whole.keys)) if index not in chosen]
    train, made = whole.part(rest), whole.part(sorted(chosen))
    apart = Tally(found=len(made.keys), captions_from=tallies["train"].captions_from)
    left = replace(tallies["train"], found=tallies["train"].found - len(made.keys))
    return {**sources, "train": train, HELD_OUT_SPLIT: made}, {**tallies, "train": left, HELD_OUT_SPLIT: apart}


def _numbering(where: Layout, samples: Mapping[str, Sequence[Sample]]) -> Numbering:
    names = where.manifest.get("classes")
    if names:
        return of_manifest(names, numbered=where.kind != FOLDER)
    labels = [[sample.label for sample in found] for found in samples.values()]
    if where.kind == FOLDER:
        return of_folders(label for found in labels for label in found if label is not None)
    return of_labels(labels)


def _refuse_empty(where: Layout, samples: Mapping[str, Sequence[Sample]], tallies: Mapping[str, Tally]) -> None:
    for split, found in samples.items():
        if found:
            continue
        place = f"split {split} of {where.path}" if where.divided else where.path
        skipped = "; ".join(
            f"{count} skipped: {reason}" for reason, count in tallies[split].told(tallies[split].skipped, "").items()
        )
        wanted = f"files ending in {', '.join(IMAGE_SUFFIXES)}"
        if where.kind != FOLDER:
            wanted = "members like KEY.png with KEY.txt and KEY.cls"
        raise VgenError(f"{place} holds no pictures: expected {wanted}{f' ({skipped})' if skipped else ''}")


def _note_unknown_classes(sources: Mapping[str, Source], tallies: Mapping[str, Tally]) -> None:
    """Notes classes of other splits that training never sees."""
    trained = set(sources["train"].labels) if "train" in sources else set()
    for split, source in sources.items():
        unknown = set(source.labels) - trained - {-1}
        if trained - {-1} and unknown:
            names = ", ".join(source.class_names[label] for label in sorted(unknown)[:5])
            tallies[split].notes.append(f"{len(unknown)} of its classes have no picture in train: {names}")


def _contents(split: str, source: Source, tally: Tally) -> SplitContents:
    labels = {label for label in source.labels if label >= 0}
    return SplitContents(
        split=split,
        found=tally.found,
        used=len(source.samples),
        skipped=tally.told(tally.skipped, ""),
        labelled=sum(label >= 0 for label in source.labels),
        classes=len(labels),
        unlabelled=tally.told(tally.unlabelled, "that of "),
        captioned=sum(bool(sample.caption) for sample in source.samples),
        captions_from=", ".join(name for name, _ in tally.captions_from.most_common()),
        notes=tuple(tally.notes),
    )
