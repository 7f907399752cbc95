"""What the classes of a model are called: `classes.json` beside the weights, and labels by name."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from pathlib import Path

from vgen.errors import VgenError, nearest
from vgen.files import write_json

FILE = "classes.json"
SHOWN = 12  # names in an error message


def save_names(folder: str | Path, names: Sequence[str]) -> None:
    """Writes the names, by label."""
    write_json(Path(folder) / FILE, {"names": list(names)})


def load_names(path: Path | None, classes: int) -> tuple[str, ...]:
    """The names in a `classes.json`; none without a file (models of the past, published ones). Raises VgenError for another file."""
    if path is None or not path.is_file():
        return ()
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["names"]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a name that is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VgenError(
            f'{path} must hold {{"names": [a name per class, …]}} ({error}); export the model again'
        ) from error
    if len(names) != classes:
        raise VgenError(f"{path} names {len(names)} classes, the model beside it has {classes}; export the model again")
    return tuple(names)


def class_number(label: int | str, classes: int, names: Sequence[str]) -> int:
    """The number of a class that is given by number or by name (capital letters do not matter unless they tell two names apart).

    A text of digits is a name where there is such a name, else a number. Raises VgenError for a class that the model does not have.
    """
    if not classes:
        raise VgenError("this model was trained without classes; give a prompt")
    if isinstance(label, str):
        same = [number for number, name in enumerate(names) if name == label]
        same = same or [number for number, name in enumerate(names) if name.casefold() == label.casefold()]
        if len(same) == 1:
            return same[0]
        if not (label.isascii() and label.isdigit()):
            raise VgenError(f"this model has no class {label!r}{nearest(label, names)}; {_known(classes, names)}")
        label = int(label)
    try:
        number = operator.index(label)
    except TypeError:
        raise VgenError(f"a class is a number or a name, got {label!r}; {_known(classes, names)}") from None
    if not 0 <= number < classes:
        raise VgenError(f"class labels of this model are 0 to {classes - 1}, got {number}")
    return number


def _known(classes: int, names: Sequence[str]) -> str:
    if not names:
        return f"it does not know what its classes are called: give a number from 0 to {classes - 1}"
    more = f", … ({len(names)} in all)" if len(names) > SHOWN else ""
    return f"its classes are {', '.join(names[:SHOWN])}{more}, or 0 to {classes - 1}"
