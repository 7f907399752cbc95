"""What lies at a path: one place decides which shards and which folders there are, and to which split they belong.

A split is named by a word (`train`, `val`, `heldout`…) in any case: of shards anywhere in the file name
(`imagenet-train-000.tar`), of folders as the whole name (`Train/`, `train2017/`).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braceexpand import UnbalancedBracesError, braceexpand

from vgen.data.text import BadFile, read_json
from vgen.data.tree import JUNK, holds_pictures, subfolders
from vgen.errors import VgenError, nearest

# In the order in which they are listed.
SPLITS = ("train", "training", "heldout", "val", "valid", "validation", "dev", "test", "testing", "eval")
_WORD = "(held[-_]?out|" + "|".join(name for name in SPLITS if name != "heldout") + ")"
_IN_NAME, _WHOLE_NAME = re.compile(f"(?<![a-z]){_WORD}(?![a-z])"), re.compile(f"{_WORD}[-_]?[0-9]*")
FOLDER, SHARDS = "image folder", "WebDataset shards"


@dataclass(frozen=True)
class Layout:
    """kind: FOLDER or SHARDS; root: where manifest and caption tables lie; parts: split -> its folder, or its shards;
    divided: whether the data names splits ("train" holds everything where it does not); manifest: of manifest.json, or {};
    notes: sentences about what is not read."""

    path: str
    kind: str
    root: Path
    parts: Mapping[str, Sequence[Path]]
    divided: bool
    manifest: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.parts)


def layout(path: str | Path) -> Layout:
    """What lies at a path: an image folder, a folder of shards (or of split folders with shards), one shard, a pattern or a range of shards.

    No picture is opened. Raises VgenError when there is nothing to read, or when it cannot be told what belongs to which split.
    """
    found = _laid_out(path)
    owners: dict[Path, tuple[str, Path]] = {}
    for split, parts in found.parts.items():
        for part in parts:
            other, twin = owners.setdefault(part.resolve(), (split, part))
            if other != split:
                raise VgenError(
                    f"{path}: {twin.name} and {part.name} are the same data (by a link), so {split} would measure what {other} "
                    "holds: give each split pictures of its own"
                )
    return found


def _laid_out(path: str | Path) -> Layout:
    place = Path(path)
    if place.is_dir():
        shards = _shards_in(place)
        return _of_shards(path, place, shards, _beside(place)) if shards else _of_folder(path, place)
    shards = [place] if place.suffix == ".tar" and place.is_file() else _matching(str(path))
    if shards:
        others = len(set(_shards_in(shards[0].parent)) - set(shards))
        notes = [f"{others} more shards beside these are not read, nor are their classes counted"] if others else []
        return _of_shards(path, shards[0].parent, shards, notes)
    if not place.exists():
        raise VgenError(
            f"{path} does not exist: expected an image folder or WebDataset shards (`vgen data emoji --out data/emoji` builds some)"
        )
    raise VgenError(f"{path} is neither a folder nor a .tar shard: expected an image folder or WebDataset shards")


def find_split(split: str, known: Iterable[str], path: object) -> str:
    """The known split that is meant (any case). Raises VgenError listing those that exist."""
    known, wanted = list(known), split.lower()
    if known == ["train"] != [wanted]:
        raise VgenError(
            f"{path} has no split {split!r}, it is all training data: put pictures into a folder (or shards) named {split}; "
            "`vgen tokenize --held-out 5%` and training (data.held_out=5%) can hold some out as well"
        )
    if wanted not in known:
        raise VgenError(f"{path} has no split {split!r}: found {', '.join(known)}{nearest(wanted, known)}")
    return wanted


def held_out_among(known: Iterable[str]) -> str | None:
    """The split to measure on where none is named: heldout, else the first of val, valid, … test, eval; None where all is for training."""
    known = set(known)
    return next((name for name in SPLITS if name in known and not name.startswith("train")), None)


def split_word(name: str, whole: bool) -> str | None:
    """The split that a name says, None for none. whole: the name must say nothing else (folders). Raises VgenError for two."""
    name = name.lower()
    if whole:
        match = _WHOLE_NAME.fullmatch(name)
        return re.sub("[-_]", "", match[1]) if match else None
    words = {re.sub("[-_]", "", word) for word in _IN_NAME.findall(name)}
    if len(words) > 1:
        raise VgenError(
            f"the shard {name} names {' and '.join(sorted(words))}: rename it, so that it belongs to one split"
        )
    return next(iter(words), None)


def _of_shards(path: str | Path, root: Path, shards: Sequence[Path], notes: Sequence[str]) -> Layout:
    named: dict[str | None, list[Path]] = {}
    for shard in shards:
        named.setdefault(split_word(shard.stem, whole=False), []).append(shard)
    unnamed = named.pop(None, [])
    if named and unnamed:
        raise VgenError(
            f"{path}: some shards name a split ({next(iter(named.values()))[0].name}) and others do not ({unnamed[0].name}): rename "
            "them, or give a pattern that takes one kind"
        )
    parts = _in_order(named) if named else {"train": unnamed}
    return Layout(str(path), SHARDS, root, parts, bool(named), _manifest(root), tuple(notes))


def _of_folder(path: str | Path, root: Path) -> Layout:
    manifest = _manifest(root)
    folders, strays = _split_folders(root)
    if not folders:
        within = next((child for child in subfolders(root) if len(_split_folders(child)[0]) > 1), None)
        if within is not None:
            raise VgenError(
                f"{root} has split folders inside {within.name}/: give {within}, or put the split folders at the top"
            )
        return Layout(str(path), FOLDER, root, {"train": [root]}, False, manifest, _ignored(root))
    notes = [*_ignored(root), *(f"{stray.name}/ is no split and is not read" for stray in strays)]
    shards = {split: _shards_in(folder) for split, folder in folders.items()}
    if any(shards.values()):
        empty = [folders[split].name for split, found in shards.items() if not found]
        if empty:
            raise VgenError(
                f"{root}: some split folders hold shards, and {', '.join(empty)} none: give one kind of data"
            )
        return Layout(str(path), SHARDS, root, shards, True, manifest, tuple(notes))
    parts = {split: [folder] for split, folder in folders.items()}
    return Layout(str(path), FOLDER, root, parts, True, manifest, tuple(notes))


def _split_folders(root: Path) -> tuple[dict[str, Path], list[Path]]:
    """Split -> folder, and the other folders; ({}, …) where the folder is not divided.

    Two split names are splits, whatever lies beside them. One alone is a split unless it lies among folders of pictures: then it
    is a class (`train`, the vehicle) if it looks like the others.
    """
    folders: dict[str, Path] = {}
    strays = []
    for folder in subfolders(root):
        split = split_word(folder.name, whole=True)
        if split is None:
            strays.append(folder)
        elif split in folders:
            raise VgenError(
                f"{root}: {folders[split].name}/ and {folder.name}/ are both split {split}: rename or merge them"
            )
        else:
            folders[split] = folder
    beside = [stray for stray in strays if holds_pictures(stray)] if len(folders) == 1 else []
    if beside:
        only = next(iter(folders.values()))
        alike = [stray for stray in beside if holds_pictures(stray, deep=False) == holds_pictures(only, deep=False)]
        if not alike:
            raise VgenError(
                f"{root}: {only.name}/ may be a split or a class, as {beside[0].name}/ beside it holds pictures too, but in another "
                "depth: move one of them away"
            )
        return {}, strays
    return _in_order(folders), strays


def _in_order(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {split: parts[split] for split in SPLITS if split in parts}


def _ignored(root: Path) -> tuple[str, ...]:
    """Sentences about the folders of operating systems."""
    return tuple(f"{child.name}/ is not read" for child in sorted(root.iterdir()) if child.name in JUNK)


def _beside(root: Path) -> tuple[str, ...]:
    """A sentence about folders with data beside shards."""
    names = [f"{folder.name}/" for folder in subfolders(root) if holds_pictures(folder) or _shards_in(folder)]
    return (f"{', '.join(names)} beside the shards: not read",) if names else ()


def _shards_in(folder: Path) -> list[Path]:
    # Hidden: half written.
    return sorted(shard for shard in folder.glob("*.tar") if shard.is_file() and not shard.name.startswith("."))


def _matching(pattern: str) -> list[Path]:
    """The shards of a pattern (`d/*.tar`), of a range (`d/train-{000..009}.tar`), or of both."""
    try:
        # Backslashes are separators on Windows, never an escape.
        names = list(braceexpand(pattern, escape=False)) if "{" in pattern else [pattern]
    except UnbalancedBracesError as error:
        raise VgenError(f"{pattern}: a range of shards is written like train-{{000..009}}.tar") from error
    found = {name: sorted(match for match in glob.glob(name) if match.endswith(".tar")) for name in names}
    missing = [name for name, matches in found.items() if not matches]
    if len(names) > 1 and missing:
        raise VgenError(f"{len(missing)} of {len(names)} shards of {pattern} do not exist, beginning with {missing[0]}")
    return list(dict.fromkeys(Path(match) for matches in found.values() for match in matches))


def _manifest(root: Path) -> Mapping[str, Any]:
    """manifest.json of `vgen data`, or one with `classes`; {} where there is none, or another program's."""
    path = root / "manifest.json"
    if not path.is_file():
        return {}
    try:
        manifest = read_json(path.read_bytes())
    except BadFile as error:
        raise VgenError(f"{path} is {error}: repair or remove it") from error
    if not isinstance(manifest, dict):
        return {}
    classes = manifest.get("classes", [])
    if not isinstance(classes, list) or len(set(map(str, classes))) < len(classes):
        raise VgenError(f"{path}: classes must be a list of different names")
    if manifest.get("complete") is False:
        raise VgenError(f"{root} is not finished: run `vgen data {manifest.get('kind', '')}` again to complete it")
    return {**manifest, "classes": [str(name) for name in classes]}


def manifest_size(path: str | Path) -> int | None:
    """The side of its pictures in pixels, where the data's manifest.json says so. Raises VgenError as `layout` does."""
    size = layout(path).manifest.get("image_size")
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None
