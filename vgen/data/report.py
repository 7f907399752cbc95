"""What was found in a dataset, what of it is used, and what is skipped and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SplitContents:
    """One split. found, used: samples; skipped: reason -> samples; labelled: of those used; classes: different ones among them;
    unlabelled: reason -> samples whose label cannot be read; captioned: of those used; captions_from: where captions are written, "" for
    nowhere; notes: sentences about what else was met.
    """

    split: str
    found: int
    used: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    labelled: int = 0
    classes: int = 0
    unlabelled: Mapping[str, int] = field(default_factory=dict)
    captioned: int = 0
    captions_from: str = ""
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line of figures, and one for every kind of trouble."""
        labels = (
            f"{self.labelled} labelled ({_count(self.classes, 'class', 'classes')})" if self.labelled else "no labels"
        )
        source = f" from {self.captions_from}" if self.captions_from else ""
        captions = f"{_count(self.captioned, 'caption')}{source}" if self.captioned else "no captions"
        return [
            f"{self.split}: {_count(self.found, 'picture')} found, {self.used} used; {labels}; {captions}",
            *(f"  {count} skipped: {reason}" for reason, count in self.skipped.items()),
            *(f"  {count} without a class: {reason}" for reason, count in self.unlabelled.items()),
            *(f"  {note}" for note in self.notes),
        ]


@dataclass(frozen=True)
class DataReport:
    """A whole dataset. classes: of all splits together; classes_from: where their names come from; notes: about the whole."""

    path: str
    kind: str
    splits: tuple[SplitContents, ...]
    classes: int = 0
    classes_from: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = sum(split.used for split in self.splits)
        classes = f", {_count(self.classes, 'class', 'classes')} (from {self.classes_from})" if self.classes else ""
        lines = [
            f"{self.path}: {self.kind}, {_count(count, 'picture')} in {_count(len(self.splits), 'split')}{classes}"
        ]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join([*lines, *(f"  {line}" for split in self.splits for line in split.lines())])


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
