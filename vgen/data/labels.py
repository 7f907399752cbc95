"""Labels and class names: what a written label means, and one numbering for all splits of a dataset."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from vgen.data.text import whole_text

# What programs write where they have no label.
_NOTHING = frozenset({"", "None", "null", "nan", "NaN", "<NA>", "-1", "-1.0"})
_NUMBER = re.compile(r"([0-9]{1,18})(\.0*)?")
# Numbers above this are identifiers rather than positions in a list of classes: they are numbered in their order.
MOST_CLASSES = 1_000_000

Label = int | str | None


class BadLabel(ValueError):
    """A label that means no class: the sample counts as unlabelled. The message names the label."""


def read_label(value: object) -> Label:
    """A label of a `.cls` member or of JSON: a number (also "3" and 3.0), a name, or None for none. Raises BadLabel."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadLabel("labels that are neither number nor name")
    text = whole_text(str(value)).strip()
    if text in _NOTHING:
        return None
    number = _NUMBER.fullmatch(text)
    if number:
        return int(number[1])
    if not any(map(str.isalpha, text)):
        raise BadLabel("labels that are neither number nor name")
    return text


@dataclass(frozen=True)
class Numbering:
    """The classes of a dataset. names: by number, () for none; source: where they come from; numbers: label as written -> number."""

    names: tuple[str, ...]
    source: str
    numbers: Mapping[Label, int]

    def number(self, label: Label) -> int:
        """The class of a label, -1 for none and for a label that is no class."""
        return self.numbers.get(label, -1)


def of_manifest(names: Sequence[str], numbered: bool) -> Numbering:
    """The classes that manifest.json lists. numbered: labels may be positions in that list, not names alone."""
    by_name = {name: number for number, name in enumerate(names)}
    positions = {number: number for number in range(len(names))} if numbered else {}
    # Names that are numbers ("7" of digits) are read as numbers from labels: positions win, as writers of shards mean them.
    numerals = {int(name): number for name, number in by_name.items() if numbered and _NUMBER.fullmatch(name)}
    return Numbering(tuple(names), "the classes of manifest.json", {**numerals, **by_name, **positions})


def of_folders(names: Iterable[str]) -> Numbering:
    """Class folders of all splits: in numeric order where all names are numbers, else by name."""
    names = set(names)
    numeric = all(re.fullmatch("[0-9]+", name) for name in names)
    ordered = sorted(names, key=lambda name: (int(name), name)) if numeric else sorted(names)
    return Numbering(tuple(ordered), "the folders", {name: number for number, name in enumerate(ordered)})


def of_labels(labels: Iterable[Iterable[Label]]) -> Numbering:
    """Labels of all splits, without a list of classes: numbers, which count from 0, or names, whichever are more.

    Numbers keep their value and are their names; names are numbered in alphabetical order.
    """
    counts = Counter(label for label in chain.from_iterable(labels) if label is not None)
    numbers = sorted(label for label in counts if isinstance(label, int))
    names = sorted(label for label in counts if isinstance(label, str))
    if sum(counts[number] for number in numbers) >= sum(counts[name] for name in names):
        if numbers and numbers[-1] < MOST_CLASSES:
            numbers = list(range(numbers[-1] + 1))
        return Numbering(tuple(map(str, numbers)), "the numbers", {number: i for i, number in enumerate(numbers)})
    return Numbering(tuple(names), "the names", {name: number for number, name in enumerate(names)})
