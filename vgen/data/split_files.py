"""The files of one split in a folder of token sets, and what the report beside them vouches for.

`SPLIT.report.json` is our mark: it is written before the tokens and once more when they are whole. Files without it are not ours and
are never touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vgen.errors import VgenError
from vgen.files import sha256, write_json


@dataclass(frozen=True)
class Record:
    """What the files of a split were made from, and their digests.

    identity: of pictures, tokenizer and settings: what the tokens follow from; description: of captions, labels, keys and class
    names; sidecar_sha256, tokens_sha256: of the two files; unreadable: indices of pictures without tokens; report: for people.
    """

    identity: str
    description: str = ""
    sidecar_sha256: str = ""
    tokens_sha256: str = ""
    unreadable: list[int] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitFiles:
    """Where the files of a split are."""

    folder: Path
    split: str

    @property
    def tokens(self) -> Path:
        return self.folder / f"{self.split}.safetensors"

    @property
    def sidecar(self) -> Path:
        return self.folder / f"{self.split}.json"

    @property
    def report(self) -> Path:
        return self.folder / f"{self.split}.report.json"

    def record(self) -> Record | None:
        """Our mark; None where there is none."""
        try:
            value = json.loads(self.report.read_text(encoding="utf-8"))
            known = {name: value[name] for name in Record.__dataclass_fields__ if name in value}
            return Record(**known)  # reports of the past have the identity only
        except (OSError, ValueError, TypeError):
            return None

    def intact(self, record: Record) -> bool:
        """Whether both files are those that the record vouches for."""
        files = ((self.sidecar, record.sidecar_sha256), (self.tokens, record.tokens_sha256))
        return all(path.is_file() and sha256(path) == digest for path, digest in files)

    def write(self, record: Record) -> None:
        """Marks the files as ours."""
        write_json(self.report, asdict(record))

    def check_ours(self) -> None:
        """Raises VgenError where a file is in the way that does not carry our mark."""
        if self.record() is not None:
            return
        for path in (self.tokens, self.sidecar, self.report):
            if path.exists():
                raise VgenError(
                    f"{path} is in the way and was not written by `vgen tokenize` (which marks its files by a {self.report.name}); "
                    "choose another --out, or move the file away"
                )

    def remove(self) -> None:
        """Removes the files of a split that carries our mark."""
        for path in (
            self.tokens,
            self.sidecar,
            self.report,
        ):  # the mark last: what an interruption leaves is still ours
            path.unlink(missing_ok=True)

    def parts(self, identity: str) -> Path:
        """The folder of finished parts of an unfinished split, of its own for other pictures, settings or another tokenizer."""
        return self.folder / f".{self.split}-{identity[:16]}"

    def remove_parts(self, keep: Path | None = None) -> None:
        """Removes the part folders of this split but `keep`."""
        for folder in self.folder.glob(f".{self.split}-*") if self.folder.is_dir() else ():
            if folder == keep or not folder.is_dir() or not re.fullmatch(r"[0-9a-f]{16}", folder.name[-16:]):
                continue
            for path in folder.iterdir():
                if re.fullmatch(r"\.?\d{9}(-\w+)?\.safetensors", path.name):
                    path.unlink()
            with suppress(OSError):  # not empty: something in it is not ours
                folder.rmdir()


def marked_splits(folder: Path) -> list[SplitFiles]:
    """The splits in a folder that carry our mark."""
    found = sorted(folder.glob("*.report.json")) if folder.is_dir() else []
    files = [SplitFiles(folder, path.name.removesuffix(".report.json")) for path in found]
    return [split for split in files if split.record() is not None]


def check_out(folder: Path, splits: Sequence[str]) -> None:
    """Raises VgenError unless the token sets of `splits` may be written into `folder`."""
    if folder.exists() and not folder.is_dir():
        raise VgenError(f"{folder} is a file, expected a folder to write")
    for split in splits:
        SplitFiles(folder, split).check_ours()


def complete(path: Path) -> bool:
    """Whether a .safetensors file is there and has its whole length."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
