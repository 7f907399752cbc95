"""Picture files: which suffixes are written, how, and how large they may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vgen.errors import VgenError
from vgen.files import atomic_path


@dataclass(frozen=True)
class Format:
    """How Pillow writes a format, and the longest side it can have."""

    side: int
    options: dict[str, Any] = field(default_factory=dict)


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


def save_picture(image: Image.Image, path: Path) -> None:
    """Writes `image` at `path`, whole or not at all, by its suffix."""
    with atomic_path(path) as temporary:
        image.save(temporary, **FORMATS[path.suffix.lower()].options)
