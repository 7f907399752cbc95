"""What the commands ask of their arguments: types for argparse, and checks of files. Nothing here imports torch.

A type turns a word into a value or says what it takes; argparse puts the option's name before it. The checks are for a
command's `check(args)`, which runs before anything heavy is imported: they look, and write nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vgen.errors import VgenError
from vgen.samplers.settings import Sampling, bounds

DEVICES = ("cpu", "cuda", "mps", "xpu")  # kinds; all but cpu may have a number, such as cuda:1


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most` (None: no end)."""
    wanted = f"a whole number {f'of at least {least}' if most is None else f'from {least} to {most}'}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {value}")
        return value

    return read


def number(least: float = -math.inf, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number from `least` to `most`; above: `least` itself is not allowed."""
    wanted = "a number"
    if least > -math.inf:
        wanted += f" above {least:g}" if above else f" of at least {least:g}"
    if most < math.inf:
        wanted += f"{' and' if least > -math.inf else ''} at most {most:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most) or (above and value == least):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return read


def add_setting(group: Any, name: str) -> None:
    """The option of a setting of `Sampling`: its kind, range and help are written there. Without it the model's own value counts."""
    part = Sampling.named(name)
    least, most, above = bounds(part)
    if "str" in part.type:
        kind: Callable[[str], Any] = str
    elif "int" in part.type:
        kind = whole(int(least or 0), most)
    else:
        kind = number(-math.inf if least is None else least, math.inf if most is None else most, above)
    text = f"{part.metadata['help']} (default: the model's)"
    group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=part.metadata["metavar"], help=text)


def picture_size(text: str) -> tuple[int, int]:
    """An argparse type: (height, width) of '256' (a square) or '192x256'."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(
            f"expected a side in pixels such as 256, or height x width such as 192x256, got {text!r}"
        )
    return int(found[1]), int(found[2] or found[1])


def margins(text: str) -> tuple[float, ...]:
    """An argparse type: four margins left,top,right,bottom, or one for all; 16 is an int (pixels), 25% the float 0.25 (a share)."""
    words = [word.strip() for word in text.split(",")]
    if len(words) not in (1, 4) or not all(re.fullmatch(r"\d{1,6}|\d{1,4}(\.\d+)?%", word, re.ASCII) for word in words):
        raise argparse.ArgumentTypeError(
            f"expected LEFT,TOP,RIGHT,BOTTOM or one number, each in pixels (16) or as a share (25%), got {text!r}"
        )
    sides = tuple(float(word[:-1]) / 100 if word.endswith("%") else int(word) for word in words)
    return sides if len(sides) == 4 else sides * 4


def device(text: str) -> str:
    """An argparse type: the name of a device in torch's words; whether this machine has it says `usable_device`."""
    kind, colon, index = text.partition(":")
    if kind not in DEVICES or (colon and not re.fullmatch(r"\d{1,3}", index, re.ASCII)):
        hint = (
            " (an NVIDIA or AMD GPU is called cuda)" if text.lower() in ("gpu", "nvidia", "amd", "rocm", "hip") else ""
        )
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:NUMBER, mps or xpu, got {text!r}{hint}")
    return text


def usable_device(name: str | None) -> str:
    """`name`, or for None the best device there is. Imports torch, so ask last. VgenError: this machine has no such device."""
    import torch

    there = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    there += [kind for kind, part in (("mps", torch.backends.mps), ("xpu", torch.xpu)) if part.is_available()]
    if name is None:
        kind = there[0].partition(":")[0] if there else "cpu"
        return "cuda" if kind == "cuda" else kind
    kind = name.partition(":")[0]
    if kind == "cpu" or name in there or (kind == name and any(one.partition(":")[0] == kind for one in there)):
        return name
    raise VgenError(f"--device {name} is not on this machine; it has {', '.join(['cpu', *there])}")


def existing(option: str, path: Path | None, kind: str = "file or folder") -> None:
    """VgenError unless `path` (None: not given) is there, is a `kind` ('file', 'folder' or either) and may be read."""
    if path is None:
        return
    if not path.exists():
        missing = next(parent for parent in (path, *path.parents) if parent.parent.exists() or parent.parent == parent)
        where = "" if missing == path else f" (there is no {missing})"
        raise VgenError(f"{option} {path} does not exist{where}; give a {kind} that is there")
    if (kind == "file" and path.is_dir()) or (kind == "folder" and not path.is_dir()):
        raise VgenError(f"{option} takes a {kind}, and {path} is a {'folder' if path.is_dir() else 'file'}")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise VgenError(f"{option} {path} may not be read by this user; change its permissions or give another")


def existing_data(option: str, path: Path) -> None:
    """As `existing`, for a dataset, which may be a pattern of shards (`d/*.tar`, `d/{000..009}.tar`)."""
    if not set("*?[{") & set(str(path)):
        existing(option, path)
        return
    from vgen.data.splits import layout

    layout(path)


def writable_file(option: str, path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """VgenError unless a picture can be written at `path` (None: not given): its suffix, its folder, the user's permission, and
    nothing there that vgen did not write."""
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        listed = " or ".join([", ".join(suffixes[:-1]), suffixes[-1]] if suffixes[1:] else suffixes)
        raise VgenError(f"{option} writes a {listed} file, got {path}")
    if path.is_dir():
        raise VgenError(f"{option} {path} is a folder; give the name of a file, such as {path / 'out'}{path.suffix}")
    if path.is_file() and path.stat().st_size:
        from vgen.layers.picture_files import is_ours

        if not is_ours(path):
            raise VgenError(
                f"{option}: vgen did not write {path}, so it is not replaced; give another name, or move it away"
            )
    writable_folder(option, path.parent)


def writable_folder(option: str, path: Path | None) -> None:
    """VgenError unless files can be made in the folder `path` (None: not given), which need not be there yet."""
    if path is None:
        return
    there = next((parent for parent in (path, *path.parents) if os.path.lexists(parent)), Path("."))
    if not there.is_dir():
        raise VgenError(
            f"{option}: {there} is in the way, it is {'a file' if there.exists() else 'a broken link'}; give another place"
        )
    try:
        # Asked of the disk itself: permissions alone say nothing about a full one, and root may do everything.
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        raise VgenError(
            f"{option}: nothing can be written to the folder {there.resolve()} ({error.strerror}); give another place"
        ) from None
