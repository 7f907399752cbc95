"""Where samples come from: a source lists keys and hands out, per index, the bytes of a picture, its caption and its label.

A source does no decoding and keeps no open files, so it can be sent to DataLoader workers.
"""

from __future__ import annotations

import csv
import glob
import json
import logging
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Protocol

from vgen.data.images import BadFile
from vgen.data.shards import IMAGE_SUFFIXES, image_member, read_index
from vgen.errors import VgenError, nearest

SPLITS = ("train", "heldout", "val", "valid", "validation", "test")
log = logging.getLogger("vgen.data")


class Source(Protocol):
    kind: str
    keys: list[str]
    class_names: tuple[str, ...]

    def image(self, index: int) -> bytes: ...
    def caption(self, index: int) -> str: ...
    def label(self, index: int) -> int: ...
    def aesthetic(self, index: int) -> float: ...  # how much people like the picture, about 1 to 10; NaN: not known


def open_source(path: str | Path, split: str = "train") -> Source:
    """An image folder, a folder of shards, one shard, or a glob pattern of shards. Raises VgenError when there is nothing to read."""
    shards = _shards_at(path)
    manifest = _manifest_in(shards[0].parent if shards else Path(path))
    if manifest.get("complete") is False:
        raise VgenError(f"{path} is not finished: run `vgen data {manifest.get('kind', '')}` again to complete it")
    if shards:
        return ShardSource(_of_split(shards, split, path), manifest)
    path = Path(path)
    if not path.exists():
        raise VgenError(f"{path} does not exist: expected an image folder or WebDataset shards (.tar)")
    if not path.is_dir():
        raise VgenError(f"{path} is neither a folder nor a .tar shard: expected an image folder or WebDataset shards")
    return FolderSource(path, split)


def splits_of(path: str | Path) -> tuple[str, ...]:
    """The splits that `open_source` accepts for a path: ("train",) when it is not divided."""
    shards = _shards_at(path)
    if shards:
        return tuple(_by_split(shards)) or ("train",)
    return tuple(name for name in SPLITS if name in _split_folders(Path(path))) or ("train",)


class FolderSource:
    """Pictures in a folder, in the order of their paths.

    Class: the first subfolder (label -1 and no classes for pictures outside subfolders). A folder whose only subfolders are split
    names (train, heldout, val, test…) holds splits, with one numbering of the classes for all of them. Captions, first found wins:
    `captions.csv` (columns: file or key, and caption) or `captions.json` ({file: caption} or [{"file", "caption"}]) beside the
    subfolders, a sidecar `NAME.txt`, a sidecar `NAME.json` (key caption or text); else "". Aesthetic score: key aesthetic_score of
    `NAME.json`. Hidden files are ignored.
    """

    kind = "image folder"

    def __init__(self, root: Path, split: str):
        folders = _split_folders(root)
        if folders:
            if split not in folders:
                raise VgenError(f"{root} has no split {split!r}: found {', '.join(folders)}{nearest(split, folders)}")
            roots, root = [root / name for name in folders], root / split
        elif split != "train":
            raise VgenError(
                f"{root} is one undivided folder, found no split {split!r}: put the pictures in train/ and {split}/"
            )
        else:
            roots = [root]
        self.root = root
        found = {folder: _pictures(folder) for folder in roots}
        self.paths = found[root]
        if not self.paths:
            raise VgenError(f"{root} holds no pictures: expected files ending in {', '.join(IMAGE_SUFFIXES)}")
        self.keys = [path.relative_to(root).with_suffix("").as_posix() for path in self.paths]
        classes = {_class_of(path, folder) for folder, paths in found.items() for path in paths}
        self.class_names = tuple(sorted(classes - {None}))
        self._numbers = {name: number for number, name in enumerate(self.class_names)}

    def image(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def caption(self, index: int) -> str:
        path = self.paths[index]
        if self._table:
            relative = path.relative_to(self.root)
            return self._table.get(relative.as_posix(), self._table.get(self.keys[index], ""))
        text = path.with_suffix(".txt")
        if text.is_file():
            return _text(text.read_bytes(), text)
        record = path.with_suffix(".json")
        return _caption_in(_record(record.read_bytes(), record)) if record.is_file() else ""

    def label(self, index: int) -> int:
        return self._numbers.get(_class_of(self.paths[index], self.root), -1)

    def aesthetic(self, index: int) -> float:
        path = self.paths[index].with_suffix(".json")
        return _aesthetic_in(_record(path.read_bytes(), path)) if path.is_file() else math.nan

    @cached_property
    def _table(self) -> dict[str, str]:
        for name, read in (("captions.csv", _captions_csv), ("captions.json", _captions_json)):
            path = self.root / name
            if path.is_file():
                table = read(path)
                files = {file.relative_to(self.root).as_posix() for file in self.paths} | set(self.keys)
                if not files & table.keys():
                    raise VgenError(
                        f"{path} names no picture of its folder: expected paths like {self.paths[0].relative_to(self.root)}"
                    )
                return table
        return {}


class ShardSource:
    """The samples of WebDataset shards, in the order of file names and then of the file.

    Caption: member `.txt`, else `caption` (or `text`) of `.json`. Label: member `.cls`, else `label` of `.json`: a number, or a
    class name. Aesthetic score: `aesthetic_score` of `.json`. Classes: those of manifest.json, else the class names met in the shards, in alphabetical order; numbers need no names.
    """

    kind = "WebDataset shards"

    def __init__(self, shards: list[Path], manifest: dict):
        samples = [sample for shard in shards for sample in read_index(shard)]
        self.samples = [sample for sample in samples if image_member(sample)]
        if not self.samples:
            raise VgenError(
                f"{', '.join(map(str, shards[:3]))} holds no pictures: expected members like KEY.png with KEY.txt and KEY.cls"
            )
        if len(self.samples) < len(samples):
            log.warning(
                "%d of %d samples of %s hold no picture and are ignored",
                len(samples) - len(self.samples),
                len(samples),
                shards[0].parent,
            )
        self.shards = shards
        self.keys = [sample.key for sample in self.samples]
        self.class_names = tuple(manifest.get("classes", ())) or self._names_in_shards()
        self._numbers = {name: number for number, name in enumerate(self.class_names)}

    def image(self, index: int) -> bytes:
        return image_member(self.samples[index]).read()

    def caption(self, index: int) -> str:
        sample = self.samples[index]
        if "txt" in sample.members:
            return _text(sample.members["txt"].read(), sample.key)
        return _caption_in(_record(sample.members["json"].read(), sample.key)) if "json" in sample.members else ""

    def label(self, index: int) -> int:
        value = self._raw_label(index)
        return value if isinstance(value, int) else self._numbers.get(value, -1)

    def aesthetic(self, index: int) -> float:
        sample = self.samples[index]
        return (
            _aesthetic_in(_record(sample.members["json"].read(), sample.key)) if "json" in sample.members else math.nan
        )

    def _raw_label(self, index: int) -> int | str:
        sample = self.samples[index]
        if "cls" in sample.members:
            value = _text(sample.members["cls"].read(), sample.key)
        elif "json" in sample.members:
            value = str(_record(sample.members["json"].read(), sample.key).get("label", -1))
        else:
            return -1
        return int(value) if value.lstrip("-").isdigit() else value

    def _names_in_shards(self) -> tuple[str, ...]:
        try:
            if isinstance(self._raw_label(0), int):  # numbered classes: no need to read every sample
                return ()
            return tuple(
                sorted({name for name in map(self._raw_label, range(len(self.keys))) if isinstance(name, str)})
            )
        except BadFile as error:
            raise VgenError(f"the labels of {self.shards[0].parent} cannot be read: {error}") from error


def _shards_at(path: str | Path) -> list[Path]:
    path = Path(path)
    if path.is_dir():
        return sorted(shard for shard in path.glob("*.tar") if not shard.name.startswith("."))  # hidden: half written
    if path.suffix == ".tar" and path.is_file():
        return [path]
    return sorted(Path(name) for name in glob.glob(str(path)) if name.endswith(".tar"))


def _by_split(shards: Iterable[Path]) -> dict[str, list[Path]]:
    named: dict[str, list[Path]] = {}
    for shard in shards:
        prefix = shard.name.split("-")[0].removesuffix(".tar")
        if prefix in SPLITS:
            named.setdefault(prefix, []).append(shard)
    return named


def _of_split(shards: list[Path], split: str, path: str | Path) -> list[Path]:
    """The shards `SPLIT-….tar`; a single file, a pattern, or shards without split names are taken whole."""
    named = _by_split(shards)
    if not Path(path).is_dir() or (not named and split == "train"):
        return shards
    if split not in named:
        raise VgenError(
            f"{path} has no shards of split {split!r}: found {', '.join(named) or 'no split names'}{nearest(split, named)}"
        )
    return named[split]


def _manifest_in(folder: Path) -> dict:
    path = folder / "manifest.json"
    return _read_json(path) if path.is_file() else {}


def _split_folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    # One class folder named "train" (the vehicle) among others must not be taken for a split.
    return names if names and all(name in SPLITS for name in names) else []


def _pictures(root: Path) -> list[Path]:
    paths = (path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(
        path
        for path in paths
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def _class_of(path: Path, root: Path) -> str | None:
    parts = path.relative_to(root).parts
    return parts[0] if len(parts) > 1 else None


def _text(contents: bytes, name: object) -> str:
    try:
        return contents.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadFile(f"{name} is not UTF-8 text") from error


def _record(contents: bytes, name: object) -> dict:
    try:
        value = json.loads(contents)
    except ValueError as error:
        raise BadFile(f"{name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadFile(f"{name} is not a JSON object")
    return value


def _caption_in(record: dict) -> str:
    return str(record.get("caption", record.get("text", ""))).strip()


def _aesthetic_in(record: dict) -> float:
    try:
        return float(record.get("aesthetic_score", math.nan))
    except (TypeError, ValueError):
        return math.nan


def _captions_csv(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise VgenError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    reader = csv.DictReader(lines)
    columns = reader.fieldnames or []
    name = next((column for column in ("file", "file_name", "path", "key") if column in columns), None)
    text = next((column for column in ("caption", "text") if column in columns), None)
    if name is None or text is None:
        raise VgenError(f"{path} needs the columns file and caption, found {', '.join(columns) or 'none'}")
    return {row[name]: (row[text] or "").strip() for row in reader}


def _captions_json(path: Path) -> dict[str, str]:
    value = _read_json(path)
    try:
        if isinstance(value, dict):
            return {str(name): str(caption).strip() for name, caption in value.items()}
        return {str(row["file"]): str(row["caption"]).strip() for row in value}
    except (TypeError, KeyError) as error:
        raise VgenError(f'{path} must be {{"file": "caption", …}} or [{{"file": …, "caption": …}}, …]') from error


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VgenError(f"{path} is not JSON ({error})") from error
