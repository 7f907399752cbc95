"""Caption tables in image folders: `captions.csv`, `captions.json`, and `metadata.csv`, `metadata.jsonl` (of Hugging Face `datasets`).

A table names files by their path from its own folder, with or without suffix, and may lie in any folder of the data: beside the
pictures, or beside the split folders. It gives a picture one caption; of several the first that is not empty.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vgen.data.text import CAPTION_FIELDS, BadFile, caption_in, caption_of, read_json, read_record, read_text
from vgen.errors import VgenError

# Where tables of the same folder disagree, the first named here wins.
TABLES = ("captions.csv", "captions.tsv", "captions.json", "captions.jsonl", "metadata.csv", "metadata.jsonl")
UNREAD = ("metadata.parquet",)
_FILE_FIELDS = ("file_name", "file", "filename", "filepath", "file_path", "path", "image", "image_path", "key")


@dataclass
class Table:
    """One table. captions: path from the root of the data -> caption; repeated: rows beyond the first of a file."""

    name: str
    captions: dict[str, str] = field(default_factory=dict)
    repeated: int = 0

    def add(self, file: str, caption: str) -> None:
        self.repeated += file in self.captions
        self.captions[file] = self.captions.get(file) or caption

    def caption(self, file: str) -> str | None:
        """The caption of a picture by its path from the root, as `tidy` writes it; None where the table does not name it."""
        return self.captions.get(file, self.captions.get(_without_suffix(file)))

    def names(self, files: Iterable[str]) -> set[str]:
        """Those of its rows that name one of these files."""
        return {name for file in files for name in (file, _without_suffix(file)) if name in self.captions}


def read_tables(root: Path, names: Iterable[str]) -> tuple[list[Table], list[str]]:
    """The tables among files below `root` (paths with "/"), those that count first; and sentences about the others.

    Raises VgenError for a table that cannot be read.
    """
    found, notes = [name for name in names if PurePosixPath(name).name in (*TABLES, *UNREAD)], []
    tables = []
    for name in sorted(
        found, key=lambda name: (-name.count("/"), (*TABLES, *UNREAD).index(PurePosixPath(name).name), name)
    ):
        if name.endswith(UNREAD):
            notes.append(f"{name} is not read: save it as metadata.csv or metadata.jsonl")
            continue
        table = _read(root, name)
        if table is None:
            notes.append(f"{name} has no column of files or none of captions: not used")
        else:
            tables.append(table)
    return tables, notes


def tidy(file: str) -> str:
    """A path as tables and folders may write it, in one form: "/" between names, composed letters."""
    return unicodedata.normalize("NFC", file.replace("\\", "/").strip().removeprefix("./"))


def _without_suffix(file: str) -> str:
    return file.removesuffix(PurePosixPath(file).suffix)


def _read(root: Path, name: str) -> Table | None:
    path, folder = root / name, PurePosixPath(name).parent
    try:
        contents = path.read_bytes()
        rows = _READERS[path.suffix](contents, path.stem == "captions")
        if rows is None:
            return None
        table = Table(name)
        for file, caption in rows:
            table.add(tidy(str(folder / tidy(file))), caption)
    except (BadFile, csv.Error) as error:
        raise VgenError(f"{path} {error}") from error
    return table


def _rows_of_csv(contents: bytes, required: bool) -> Iterator[tuple[str, str]] | None:
    text = _text(contents)
    for delimiter in (",", ";", "\t"):
        # newline="": the csv module itself ends rows, so that no other separator of lines (U+2028, form feed) does.
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        columns = {(name or "").strip().lower(): name for name in rows.fieldnames or []}
        file = next((columns[name] for name in _FILE_FIELDS if name in columns), None)
        captions = [columns[name] for name in CAPTION_FIELDS if name in columns]
        if file is not None and captions:
            return ((row[file], _first(row, captions)) for row in rows if row[file])
    if required:
        found = ", ".join(map(repr, next(csv.reader(io.StringIO(text, newline="")), []))) or "none"
        raise BadFile(f"needs the columns file and caption, found {found}")
    return None


def _first(row: Mapping[str, str | None], columns: Iterable[str]) -> str:
    return next(filter(None, (caption_of(row[column]) for column in columns)), "")


def _text(contents: bytes) -> str:
    try:
        return read_text(contents)
    except BadFile as error:
        raise BadFile("is not UTF-8 text: save it as UTF-8") from error


def _rows_of_json(contents: bytes, required: bool) -> Iterable[tuple[str, str]]:
    try:
        value = read_json(contents)
    except BadFile as error:
        raise BadFile(f"is not JSON: {error}") from error
    if isinstance(value, dict):
        return [
            (file, caption_in(entry) if isinstance(entry, dict) else caption_of(entry)) for file, entry in value.items()
        ]
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return _rows_of_records(value, required) or []
    raise BadFile('must be {"file": "caption", …} or [{"file": …, "caption": …}, …]')


def _rows_of_jsonl(contents: bytes, required: bool) -> Iterable[tuple[str, str]] | None:
    # Lines end at "\n" and nowhere else: JSON may hold the other separators of lines as they are.
    records = []
    for number, line in enumerate(_text(contents).split("\n"), 1):
        if line.strip():
            try:
                records.append(read_record(line))
            except BadFile as error:
                raise BadFile(f"line {number}: {error}") from error
    return _rows_of_records(records, required)


def _rows_of_records(records: list[dict], required: bool) -> Iterable[tuple[str, str]] | None:
    files = [
        next((record[name] for name in _FILE_FIELDS if isinstance(record.get(name), str)), None) for record in records
    ]
    if not any(name in record for record in records for name in CAPTION_FIELDS) or not any(files):
        if required:
            raise BadFile('must be {"file": "caption", …} or [{"file": …, "caption": …}, …]')
        return None
    return [(file, caption_in(record)) for file, record in zip(files, records) if file]


_READERS = {".csv": _rows_of_csv, ".tsv": _rows_of_csv, ".json": _rows_of_json, ".jsonl": _rows_of_jsonl}
