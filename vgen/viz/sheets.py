"""Contact sheets: pictures in a grid, with labels under them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, PAPER = "#222222", "#ffffff"


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The scalable font that ships with Pillow."""
    return ImageFont.load_default(size)


def columns_for(count: int) -> int:
    """Columns of the squarest grid that holds `count` pictures."""
    return math.ceil(math.sqrt(count))


@dataclass(frozen=True)
class Layout:
    """Where pictures of one size stand on a page, all in pixels. size: (width, height) of a picture on the page."""

    count: int
    size: tuple[int, int]
    columns: int
    labelled: bool = False
    titled: bool = False
    gap: int = 8

    @property
    def text(self) -> int:
        """Height of the letters."""
        return max(11, self.size[0] // 11)

    @property
    def head(self) -> int:
        """Height of the title above all pictures."""
        return int(2.2 * self.text) if self.titled else 0

    @property
    def pitch(self) -> tuple[int, int]:
        """From one picture to the next: to the right, and down past its label."""
        return self.size[0] + self.gap, self.size[1] + (int(2.6 * self.text) if self.labelled else 0) + self.gap

    @property
    def page(self) -> tuple[int, int]:
        """Size of the page."""
        right, down = self.pitch
        return self.columns * right + self.gap, self.head + math.ceil(self.count / self.columns) * down + self.gap

    def place(self, index: int) -> tuple[int, int]:
        """Upper left corner of a picture."""
        right, down = self.pitch
        return self.gap + index % self.columns * right, self.head + self.gap + index // self.columns * down


class Sheet:
    """A page that is filled picture by picture, so that only the page is in memory. Pictures are enlarged to the layout's size."""

    def __init__(self, layout: Layout, title: str | None = None):
        self.layout = layout
        self.page = Image.new("RGB", layout.page, PAPER)
        self.draw = ImageDraw.Draw(self.page)
        if title:
            place = self.page.width // 2, layout.gap + layout.text // 2
            self.draw.text(place, title, fill=INK, font=font(int(1.2 * layout.text)), anchor="mt")

    def put(self, index: int, image: Image.Image, label: str | None = None) -> None:
        """Lays picture `index` on the page; its label is wrapped to two lines below it."""
        (left, top), (width, height) = self.layout.place(index), self.layout.size
        self.page.paste(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (left, top))
        if label is not None:
            size = self.layout.text
            characters = max(8, int(width / (0.52 * size)))
            lines = textwrap.wrap(label, characters, max_lines=2, placeholder="…") or [""]
            self.draw.multiline_text(
                (left + width // 2, top + height + 2),
                "\n".join(lines),
                fill=INK,
                font=font(size),
                anchor="ma",
                align="center",
                spacing=1,
            )


def sheet(
    images: Sequence[Image.Image],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int = 1,
    title: str | None = None,
    gap: int = 8,
) -> Image.Image:
    """Pictures of one size in a grid. scale: integer enlargement; labels are wrapped to two lines below each picture."""
    width, height = images[0].size
    columns = columns or columns_for(len(images))
    page = Sheet(
        Layout(len(images), (width * scale, height * scale), columns, bool(labels), bool(title), gap), title=title
    )
    for index, image in enumerate(images):
        page.put(index, image, labels[index] if labels else None)
    return page.page
