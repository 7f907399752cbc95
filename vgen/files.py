"""Files that are either complete or absent, and nothing lost that is not ours.

Everything vgen writes goes to a temporary name and is renamed. A folder that it writes whole gets a mark (`.vgen.json`: what it is, and
the names of its files); only a folder that holds nothing else is ever replaced or removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vgen.errors import VgenError

MARK = ".vgen.json"
LOCK = ".vgen.lock"
# Exported models had no mark before vgen wrote one: these classes in config.json or model_index.json, and no other files than these, are ours.
_CLASSES_BEFORE_MARKS = frozenset(
    {"VisualPipeline", "VQModel", "MaskGITVQGAN", "KLModel", "FlexTok", "ChameleonVQGAN", "TiTokVQ", "TiTokVAE"}
    | {"TiTokLegacy", "MingTok", "FlexTokVAE", "TokenBridge", "FlexARModel", "AnyOrderModel", "XARModel", "RARModel"}
    | {"NARModel", "LlamaGenModel", "MaskGenKL", "MaskGenVQ", "LuminaModel", "HiMAR", "MAR", "TokenBridgeGenerator"}
    | {"MingUniVision", "DARModel", "PARModel", "MaskGITViT", "MaskGITUViT"}
)
_FILES_BEFORE_MARKS = frozenset({"config.json", "model_index.json", "vocabulary.json", "tokenizer.json"})
_FOLDERS_BEFORE_MARKS = frozenset({".", "model", "tokenizer"})


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` (same suffix); on success it is flushed to disk and renamed, else removed.

    Raises VgenError where `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise VgenError(f"{path} is a folder, expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private; a result should follow the user's umask
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, kind: str = "model") -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of `path`, with a mark, else it is removed.

    A kill at any moment leaves the old folder or the new one. Raises VgenError as `check_folder`, before and again after the work.
    """
    check_folder(path, kind)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    os.chmod(temporary, 0o777 & ~_umask())
    try:
        yield temporary
        _write_mark(temporary, kind, _names(temporary))
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        check_folder(path, kind)
        if path.exists():
            _exchange(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def marked(folder: Path, kind: str) -> Iterator[None]:
    """Marks what the block writes in `folder`, which exists, beside what a mark of this kind has already. Other files stay foreign."""

    def states() -> dict[str, tuple[int, int, int]]:
        found = ((name, (folder / name).lstat()) for name in _names(folder))
        return {name: (state.st_ino, state.st_mtime_ns, state.st_size) for name, state in found}

    before, known = states(), ours(folder, kind)
    yield
    after = states()
    _write_mark(folder, kind, sorted(name for name in after if name in known or before.get(name) != after[name]))


def ours(folder: Path, kind: str) -> set[str]:
    """The names in a folder that vgen wrote there as (part of) a `kind`, by its mark."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return {MARK, *mark["files"]} if mark["kind"] == kind else set()
    except (OSError, ValueError, KeyError, TypeError):
        return _before_marks(folder, kind)


def _write_mark(folder: Path, kind: str, names: list[str]) -> None:
    mark = {"what": f"written by vgen, which may replace this {kind}", "kind": kind, "files": names}
    (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")


def check_folder(path: str | Path, kind: str = "model") -> None:
    """Raises VgenError unless `atomic_folder(path, kind)` may write there: a new or empty folder, or one of `kind` that vgen wrote.

    Call it before the work, so that nobody waits an hour for a refusal.
    """
    path = Path(path)
    if path.is_symlink():
        raise VgenError(f"{path} is a link, and what it leads to might not be meant: name the folder itself")
    whole, here = path.resolve(), Path.cwd()
    if whole == here or whole in here.parents:
        raise VgenError(
            f"{path} is the current folder or one that holds it: name a new folder to write, such as {path / kind}"
        )
    if path.exists() and not path.is_dir():
        raise VgenError(f"{path} is a file, expected a folder to write")
    if found := foreign_files(path, kind):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise VgenError(
            f"{path} holds files that vgen did not write as a {kind} ({', '.join(found[:3])}{more}); nothing was changed: "
            "name a new folder, or move them away"
        )
    parent = next(folder for folder in whole.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise VgenError(f"{path} cannot be written: {parent} is {'not writable' if parent.is_dir() else 'a file'}")


def foreign_files(folder: str | Path, kind: str) -> list[str]:
    """The names in a folder (none where it does not exist) that vgen did not write there as part of a `kind`."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = ours(folder, kind)
    return [name for name in _names(folder) if name not in found]


def missing_files(folder: Path) -> list[str]:
    """`"a.safetensors is missing"` for every file that the mark of a folder names and that is not there."""
    try:
        names = json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]
        return [f"{name} is missing" for name in names if not (folder / name).exists()]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def remove_folder(folder: Path, kind: str) -> bool:
    """Removes a folder of `kind` that vgen wrote. False, and nothing happens, where it is a link or holds anything else."""
    if folder.is_symlink() or foreign_files(folder, kind):
        return False
    # Renamed first, so that a kill in the middle leaves no half-empty folder under a valid name.
    doomed = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    return True


@contextmanager
def sole_user(folder: str | Path, work: str) -> Iterator[None]:
    """Within the block nobody else can enter `sole_user(folder, …)`. The folder is made where it is missing.

    work: what this process does there ("training"), for those who are refused. The lock ends with the process, however it ends.
    Raises VgenError, naming the process that holds it.
    """
    import fcntl

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
                yield
                return
            holder = os.pread(handle, 1000, 0).decode("utf-8", "replace").strip() or "another process"
            raise VgenError(
                f"{folder} is in use by {holder}; wait until it ends, stop it, or choose another folder"
            ) from None
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{work}, process {os.getpid()} on {socket.gethostname()} since {started}\n".encode(), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        _held.discard(handle)
        os.close(handle)


# A child that was forked (a loader's worker) shares the lock; it must not keep it when its parent is killed.
_held: set[int] = set()


def _release_in_child() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names(folder: Path) -> list[str]:
    """Every file, link and empty folder below `folder`, relative to it."""
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [os.path.relpath(os.path.join(root, name), folder) for name in (*files, *links)]
        if not files and not folders and root != str(folder):
            found.append(os.path.relpath(root, folder))
    return sorted(Path(name).as_posix() for name in found)


def _before_marks(folder: Path, kind: str) -> set[str]:
    """The files that an older vgen wrote, without a mark, as a model or a checkpoint."""
    if kind == "checkpoint":
        complete = (folder / "state.json").is_file()
        endings = ("state.json", ".safetensors", ".optimizer.pt")
        return {name for name in _names(folder) if complete and "/" not in name and name.endswith(endings)}
    if kind != "model":
        return set()
    for name in ("model_index.json", "config.json"):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        kind_of = config.get("_class_name") if isinstance(config, dict) else None
        if not isinstance(kind_of, str) or kind_of not in _CLASSES_BEFORE_MARKS:
            return set()
        if config["_class_name"] == "VQModel" and "encoder_ch_mult" not in config:  # diffusers has a VQModel too
            return set()
        return {
            name
            for name in _names(folder)
            if Path(name).parent.as_posix() in _FOLDERS_BEFORE_MARKS
            and (Path(name).name in _FILES_BEFORE_MARKS or name.endswith((".safetensors", ".safetensors.index.json")))
        }
    return set()


def _exchange(new: Path, old: Path) -> None:
    """Puts `new` in the place of the folder `old`, and `old` in that of `new`: in one step where the system can (Linux)."""
    if sys.platform == "linux":
        import ctypes

        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE (linux/fcntl.h, linux/fs.h)
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename is not None and rename(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
            return
    aside = Path(tempfile.mkdtemp(prefix=f".{old.name}-", dir=old.parent))
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except OSError:
        os.replace(aside, old)
        raise
    os.replace(aside, new)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
