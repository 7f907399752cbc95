"""Which token sets of a folder belong together: `splits.json`, written when `vgen tokenize` has finished every split.

A generator whose held-out tokens come from other pictures, another tokenizer or other classes than its training tokens learns
undisturbed, and its held-out figures mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from vgen.data.tokens import TokenDataset
from vgen.errors import VgenError
from vgen.files import write_json

FILE = "splits.json"
AGAIN = "run `vgen tokenize` on the whole dataset again"


def write_splits(folder: str | Path, sidecars: Mapping[str, str]) -> None:
    """Notes that these splits (name -> digest of the sidecar) are of one run over one dataset."""
    write_json(Path(folder) / FILE, {"splits": dict(sidecars)})


def read_splits(folder: str | Path) -> dict[str, str] | None:
    """What `write_splits` noted; None where nothing is (sets of the past, or written one by one)."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        return {
            str(name): str(sidecar) for name, sidecar in json.loads(path.read_text(encoding="utf-8"))["splits"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VgenError(f"{path} does not say which token sets belong together ({error}); {AGAIN}") from error


def check_together(train: TokenDataset, held_out: TokenDataset) -> None:
    """Raises VgenError unless both sets are of the same tokenizer and classes and, as far as their folder says, of one run."""
    pair = f"{train.path} and {held_out.path} do not belong together"
    tokenizers = [(data.tokenizer_sha256, data.tokenizer_config) for data in (train, held_out)]
    if tokenizers[0] != tokenizers[1]:
        raise VgenError(
            f"{pair}: they were made with different tokenizers ({train.tokenizer}, {held_out.tokenizer}); {AGAIN}"
        )
    if train.spec != held_out.spec:
        raise VgenError(f"{pair}: one holds {train.spec}, the other {held_out.spec}; {AGAIN}")
    if train.class_names != held_out.class_names:
        raise VgenError(
            f"{pair}: the first has {len(train.class_names)} classes, the second {len(held_out.class_names)} "
            f"(first difference: {_first_difference(train.class_names, held_out.class_names)}), so labels mean different classes; {AGAIN}"
        )
    noted = read_splits(train.path.parent) if train.path.parent == held_out.path.parent else None
    if noted is None:
        return
    for data in (train, held_out):
        if noted.get(data.path.stem) != data.sidecar_sha256:
            found = "is not of that run" if data.path.stem in noted else f"is not among them ({', '.join(noted)})"
            raise VgenError(
                f"{pair}: {train.path.parent / FILE} notes the splits of the last finished run of `vgen tokenize`, and {data.path.name} "
                f"{found}: that run was interrupted, or the file comes from elsewhere; {AGAIN}"
            )


def _first_difference(ours: tuple[str, ...], others: tuple[str, ...]) -> str:
    for number in range(max(len(ours), len(others))):
        names = [repr(names[number]) if number < len(names) else "nothing" for names in (ours, others)]
        if names[0] != names[1]:
            return f"class {number} is {names[0]} in one and {names[1]} in the other"
    return "none"
