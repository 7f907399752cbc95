"""Pictures of decode orders: which position is decoded in which call (Pillow only)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vgen.errors import VgenError
from vgen.layers.picture_files import save_animation, save_picture
from vgen.samplers.orders import BaseOrder

Colour = tuple[int, int, int]

# Anchors of the viridis colour map (CC0, van der Walt & Smith): dark is early, bright is late.
VIRIDIS = (
    "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e 1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725"
)
PAPER, INK, SOFT, EMPTY, NOW = (255, 255, 255), (28, 30, 38), (118, 122, 134), (232, 234, 239), (240, 84, 60)
TITLE, SMALL, NUMBER = 17, 13, 9  # font sizes; NUMBER is the smallest that is still readable inside a cell
PADDING, GAP = 14, 10  # around a panel; between the frames of a video
STRIP, WIDE = 304, 720  # pixels across the cells of a picture; of a video's frames
WRAP = 32  # a 1-D order is drawn in rows of this many positions


def colour_map(values: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1] of any shape [...] -> viridis colours [..., 3] uint8."""
    anchors = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in VIRIDIS.split()], dtype=float)
    place = np.clip(values, 0, 1) * (len(anchors) - 1)
    channels = [np.interp(place, np.arange(len(anchors)), anchors[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def plot(order: BaseOrder, path: str | Path | None = None) -> Image.Image:
    """A heat map of the call in which every position is decoded, titled with the order's name and calls.

    Step numbers (from 1) are written into the cells where they fit; the frames of a video stand side by side. Orders
    with randomness show sample 0. path: also written there (format by suffix).
    """
    return _sheet([order], path, columns=1)


def plot_all(orders: Sequence[BaseOrder], path: str | Path | None = None, columns: int | None = None) -> Image.Image:
    """The heat maps of several orders side by side. columns: panels in a row (default: about 3:2). path: as `plot`."""
    return _sheet(orders, path, columns)


def animate(orders: BaseOrder | Sequence[BaseOrder], path: str | Path, seconds: float = 8.0) -> None:
    """Writes a GIF in which one order, or several in step, decode the grid call by call; then a pause.

    All orders make their calls at the same rate, so those with fewer calls are finished earlier. Red: the positions of
    the present call. seconds: length of the longest order's run; very long runs skip frames.
    """
    if Path(path).suffix.lower() != ".gif":
        raise VgenError(f"an animation is written as .gif, got {Path(path).name!r}")
    orders = [orders] if isinstance(orders, BaseOrder) else orders
    panels = _place(orders, None, scale=1.0 if len(orders) == 1 else 0.55)
    longest = max(panel.order.calls for panel in panels)
    stride = math.ceil(longest / 100)
    shown = sorted({*range(0, longest, stride), longest})
    pictures = []
    for done in shown:
        image = _paper(panels)
        for panel in panels:
            panel.draw(image, done, stride)
        pictures.append(image)
    palette = _palette()
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [max(20, round(1000 * seconds / len(shown) / 10) * 10)] * (len(shown) - 1) + [2000]
    save_animation(pictures, path, durations)


@dataclass
class _Panel:
    """One order's heat map at (x, y) of a sheet. A 1-D order is folded into rows."""

    order: BaseOrder
    scale: float = 1.0
    x: int = 0
    y: int = 0
    ids: np.ndarray = field(init=False)
    colours: list[Colour] = field(init=False)

    def __post_init__(self):
        frames, rows, columns = self.order.grid
        self.ids = self.order.step_ids().numpy()
        self.colours = [tuple(colour) for colour in colour_map(self.ids / max(1, self.order.calls - 1)).tolist()]
        self.fold = WRAP if rows == 1 and frames == 1 and columns > WRAP else columns
        self.rows = rows * math.ceil(columns / self.fold)
        across = int(self.scale * (WIDE if frames > 1 else STRIP))
        self.frames_across = min(frames, 8)
        self.cell = max(4, min(36, across // (self.frames_across * self.fold), 2 * across // self.rows))
        self.frames_down = math.ceil(frames / self.frames_across)

    @property
    def map_size(self) -> tuple[int, int]:
        """Pixels of the cells, without title and padding."""
        width = self.frames_across * (self.fold * self.cell + GAP) - GAP
        return width, self.frames_down * (self.rows * self.cell + GAP) - GAP

    @property
    def size(self) -> tuple[int, int]:
        """Pixels of the whole panel."""
        width, height = self.map_size
        return max(width, 170) + 2 * PADDING, height + 2 * PADDING + TITLE + SMALL + 12

    def box(self, position: int) -> tuple[int, int, int, int]:
        """Pixel rectangle of a position's cell on the sheet (inclusive corners)."""
        frame_size = self.order.grid[1] * self.order.grid[2]
        frame, inside = divmod(position, frame_size)
        row, column = divmod(inside, self.fold)
        down, across = divmod(frame, self.frames_across)
        x = self.x + PADDING + across * (self.fold * self.cell + GAP) + column * self.cell
        y = self.y + PADDING + TITLE + SMALL + 12 + down * (self.rows * self.cell + GAP) + row * self.cell
        line = 1 if self.cell >= 8 else 0
        return x, y, x + self.cell - 1 - line, y + self.cell - 1 - line

    def draw(self, image: Image.Image, done: int | None = None, fresh: int = 1) -> None:
        """Title and cells. done: calls made so far (None: the whole order); the last `fresh` of them are red."""
        pen = ImageDraw.Draw(image)
        width = self.size[0] - 2 * PADDING
        pen.text((self.x + PADDING, self.y + PADDING), self.order.name, INK, _fit(self.order.name, TITLE, width))
        calls = self.order.calls if done is None else min(done, self.order.calls)
        text = (
            f"{calls} call{'s' * (calls != 1)}" if calls == self.order.calls else f"{calls} of {self.order.calls} calls"
        )
        if done is None and self.order.varies:
            text += f", {self.order.varies}"
        pen.text((self.x + PADDING, self.y + PADDING + TITLE + 5), text, SOFT, _fit(text, SMALL, width))
        font = self._number_font() if done is None else None
        for position, (step, colour) in enumerate(zip(self.ids.tolist(), self.colours)):
            box = self.box(position)
            if done is not None and step >= calls:
                colour = EMPTY
            elif done is not None and calls < self.order.calls and step >= calls - fresh:
                colour = NOW
            pen.rectangle(box, fill=colour)
            if font:
                middle = ((box[0] + box[2] + 1) / 2, (box[1] + box[3] + 1) / 2)
                pen.text(middle, str(step + 1), PAPER if _dark(colour) else INK, font, anchor="mm")

    def _number_font(self) -> ImageFont.FreeTypeFont | None:
        """The font for step numbers, or None when they would not fit their cells."""
        size = min(13, self.cell // 2)
        while size >= NUMBER:
            font = ImageFont.load_default(size)
            if font.getlength(str(self.order.calls)) <= self.cell - 4:
                return font
            size -= 1
        return None


def _sheet(orders: Sequence[BaseOrder], path: str | Path | None, columns: int | None) -> Image.Image:
    panels = _place(orders, columns)
    image = _paper(panels)
    for panel in panels:
        panel.draw(image)
    if path is not None:
        save_picture(image, path)
    return image


def _place(orders: Sequence[BaseOrder], columns: int | None, scale: float = 1.0) -> list[_Panel]:
    """Panels in rows, each with the room of the largest. columns None: full rows and a sheet of about 3:2."""
    if not orders:
        raise VgenError("there is no order to draw")
    panels = [_Panel(order, scale) for order in orders]
    width, height = (max(panel.size[axis] for panel in panels) for axis in (0, 1))

    def oddness(columns: int) -> float:
        rows = math.ceil(len(panels) / columns)
        return abs(math.log(columns * width / (rows * height) / 1.5)) + (columns * rows - len(panels)) / len(panels)

    columns = min(columns, len(panels)) if columns else min(range(1, len(panels) + 1), key=oddness)
    for index, panel in enumerate(panels):
        panel.x, panel.y = index % columns * width, index // columns * height
    return panels


def _paper(panels: Sequence[_Panel]) -> Image.Image:
    """A white sheet that holds all panels, with the legend at the bottom."""
    width = max(panel.x + panel.size[0] for panel in panels)
    bottom = max(panel.y + panel.size[1] for panel in panels)
    image = Image.new("RGB", (width, bottom + SMALL + PADDING), PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(SMALL)
    bar = 120
    left = PADDING + round(font.getlength("first call")) + 8
    ramp = colour_map(np.linspace(0, 1, bar))[None].repeat(8, axis=0)
    image.paste(Image.fromarray(ramp), (left, bottom + 3))
    pen.text((PADDING, bottom), "first call", SOFT, font)
    pen.text((left + bar + 8, bottom), "last call", SOFT, font)
    return image


def _palette() -> Image.Image:
    """One palette for all pictures of an animation, so that nothing flickers: cells, and text on paper."""
    blend = [np.linspace(ink, PAPER, 10).round().astype(np.uint8) for ink in (INK, SOFT)]
    colours = np.concatenate((np.array([EMPTY, NOW], dtype=np.uint8), *blend, colour_map(np.linspace(0, 1, 200))))
    image = Image.new("P", (1, 1))
    image.putpalette(colours.tobytes())
    return image


def _fit(text: str, size: int, width: int) -> ImageFont.FreeTypeFont:
    """The largest font up to `size` in which `text` is at most `width` pixels wide (not below 8)."""
    while size > 8 and ImageFont.load_default(size).getlength(text) > width:
        size -= 1
    return ImageFont.load_default(size)


def _dark(colour: Colour) -> bool:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 140
