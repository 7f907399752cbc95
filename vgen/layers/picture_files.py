"""Picture files: which suffixes are written, how, how large they may be, and the mark by which vgen knows its own again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vgen.errors import VgenError
from vgen.files import atomic_path


@dataclass(frozen=True)
class Format:
    """How Pillow writes a format, and the longest side it can have."""

    side: int
    options: dict[str, Any] = field(default_factory=dict)


MARK = "vgen"
SOFTWARE = 0x0131  # EXIF's tag of the program that made a picture
JPEG = Format(65500, {"quality": 95, "subsampling": 0})
# .png and .webp hold exactly what was made, the others lose a little. Sides: of the formats, for JPEG of libjpeg.
FORMATS = {
    ".png": Format(2**31 - 1),
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".webp": Format(16383, {"lossless": True}),
    ".avif": Format(65536, {"quality": 90}),
}


def suffixes() -> list[str]:
    """Those of `FORMATS` that the installed Pillow can write."""
    Image.init()
    return [suffix for suffix in FORMATS if Image.registered_extensions().get(suffix) in Image.SAVE]


def check_side(path: Path, size: tuple[int, int]) -> None:
    """VgenError for a picture of (width, height) that the format of `path` cannot hold."""
    side = FORMATS[path.suffix.lower()].side
    if max(size) > side:
        raise VgenError(
            f"a {path.suffix} file holds at most {side} pixels a side, and this one would have {size[0]}x{size[1]}; write a .png"
        )


def save_picture(image: Image.Image, path: str | Path) -> None:
    """Writes `image` at `path`, whole or not at all, by its suffix (of `FORMATS`), with vgen's mark."""
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise VgenError(f"a picture is written as {', '.join(FORMATS)}, got {path.name!r}")
    with atomic_path(path) as temporary:
        image.save(temporary, **kind.options, **_mark(path))


def save_animation(frames: Sequence[Image.Image], path: str | Path, durations: Sequence[int]) -> None:
    """Writes frames that are shown for `durations` milliseconds, again and again, as .gif or .webp, with vgen's mark."""
    path = Path(path)
    if path.suffix.lower() not in (".gif", ".webp"):
        raise VgenError(f"an animation is written as .gif or .webp, got {path.name!r}")
    rest = {"append_images": list(frames[1:]), "duration": list(durations), "loop": 0, "optimize": False}
    with atomic_path(path) as temporary:
        frames[0].save(temporary, save_all=True, **rest, **_mark(path))


def is_ours(path: str | Path) -> bool:
    """Whether vgen wrote this picture: it has the mark. False for files that are no pictures."""
    try:
        with Image.open(path) as image:
            software = image.info.get("Software") or image.getexif().get(SOFTWARE)
            return MARK in (software, image.info.get("comment", b"").decode("latin-1"))
    except Exception:  # Pillow's readers raise everything from SyntaxError to struct.error at foreign files
        return False


def _mark(path: Path) -> dict[str, Any]:
    """Arguments of Pillow's `save` that put the mark where the format has room for it."""
    suffix = path.suffix.lower()
    if suffix == ".gif":
        return {"comment": MARK.encode()}
    if suffix == ".png":
        text = PngInfo()
        text.add_text("Software", MARK)
        return {"pnginfo": text}
    exif = Image.Exif()
    exif[SOFTWARE] = MARK
    return {"exif": exif}
