"""The files below a folder: links to folders are followed, system and hidden files are not seen."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".jp2", ".ppm", ".pgm", ".tga"),
)
# Pictures that Pillow alone does not read: worth a word in the report.
OTHER_PICTURES = (".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw", ".exr")
# What operating systems and file servers leave behind.
JUNK = frozenset({"__MACOSX", "lost+found", "@eaDir", "__pycache__", "$RECYCLE.BIN", "System Volume Information"})


def is_picture(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def subfolders(root: Path) -> list[Path]:
    """The folders (and links to folders) in a folder that may hold data, by name."""
    # scandir: tells folders from a million files without asking the disk about each.
    return sorted(Path(entry.path) for entry in os.scandir(root) if not _hidden(entry.name) and _is_folder(entry))


def holds_pictures(root: Path, deep: bool = True) -> bool:
    """Whether there is a picture below a folder, or (not deep) right in it."""
    return any(is_picture(name) and (deep or "/" not in name) for name in files_below(root, Counter()))


def files_below(root: Path, notes: Counter[str]) -> Iterator[str]:
    """Paths of files relative to `root`, with "/", in no particular order.

    A folder is read once below each folder of `root`, however many links lead to it: links in a circle end.
    notes: counts what could not be followed.
    """
    yield from _walk(str(root), "", {_identity(root)}, notes)


def _walk(folder: str, prefix: str, seen: set[tuple[int, int]], notes: Counter[str]) -> Iterator[str]:
    try:
        entries = [entry for entry in os.scandir(folder) if not _hidden(entry.name)]
    except OSError:
        notes["folder that cannot be read"] += 1
        return
    for entry in entries:
        name = prefix + entry.name
        if _is_folder(entry):
            identity = _identity(entry.path)
            # Two classes may share a folder by links, one class must not read it twice.
            below = seen if prefix else set(seen)
            if identity in below:
                notes["link to a folder that is read already"] += 1
                continue
            below.add(identity)
            yield from _walk(entry.path, f"{name}/", below, notes)
        elif not entry.is_symlink() or os.path.isfile(entry.path):
            yield name
        else:
            notes["link that leads nowhere"] += 1


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in JUNK


def _is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # isdir: links may lead to themselves


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
