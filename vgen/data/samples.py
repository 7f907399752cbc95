"""A sample before it is decoded, and the tally of what was met on the way to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vgen.data.labels import Label


class Readable(Protocol):
    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class File:
    """A picture file."""

    path: Path

    def read(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True, slots=True)
class Sample:
    """key: unique in its split; pictures: the same picture in one or more files, the first that can be read counts; label: as written;
    aesthetic: how much people like the picture, about 1 to 10, NaN where it is not known.
    """

    key: str
    pictures: tuple[Readable, ...]
    caption: str
    label: Label
    aesthetic: float


@dataclass
class Tally:
    """Counts of a split while it is read: see `SplitContents`."""

    found: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    unlabelled: Counter[str] = field(default_factory=Counter)
    captions_from: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    examples: dict[str, str] = field(default_factory=dict)  # reason -> the first sample that it met

    def skip(self, reason: str, key: str) -> None:
        """Counts a sample that is not used."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, key)

    def unlabel(self, reason: str, key: str) -> None:
        """Counts a sample whose label is no class."""
        self.unlabelled[reason] += 1
        self.examples.setdefault(reason, key)

    def told(self, counts: Counter[str], example: str) -> dict[str, int]:
        """`skipped` or `unlabelled` with an example each. example: what is said before the name of the sample."""
        return {f"{reason}, such as {example}{self.examples[reason]}": count for reason, count in counts.items()}
