"""Contact sheets: pictures in a grid, with labels under them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PAPER = "#222222", "#ffffff"


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The scalable font that ships with Pillow."""
    return ImageFont.load_default(size)


def columns_for(count: int) -> int:
    """Columns of the squarest grid that holds `count` pictures."""
    return math.ceil(math.sqrt(count))


def sheet(
    images: Sequence[Image.Image],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    scale: int = 1,
    title: str | None = None,
    gap: int = 8,
) -> Image.Image:
    """Pictures of one size in a grid. scale: integer enlargement; labels are wrapped to two lines below each picture."""
    width, height = (side * scale for side in images[0].size)
    columns = columns or columns_for(len(images))
    rows = math.ceil(len(images) / columns)
    size = max(11, width // 11)
    text = font(size)
    caption = int(2.6 * size) if labels else 0
    head = int(2.2 * size) if title else 0
    page = Image.new("RGB", (columns * (width + gap) + gap, head + rows * (height + caption + gap) + gap), PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((page.width // 2, gap + size // 2), title, fill=INK, font=font(int(1.2 * size)), anchor="mt")
    for index, image in enumerate(images):
        left = gap + index % columns * (width + gap)
        top = head + gap + index // columns * (height + caption + gap)
        page.paste(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), (left, top))
        if labels:
            characters = max(8, int(width / (0.52 * size)))
            lines = textwrap.wrap(labels[index], characters, max_lines=2, placeholder="…") or [""]
            draw.multiline_text(
                (left + width // 2, top + height + 2),
                "\n".join(lines),
                fill=INK,
                font=text,
                anchor="ma",
                align="center",
                spacing=1,
            )
    return page
