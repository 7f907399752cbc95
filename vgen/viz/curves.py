"""Small plots without a plotting library: labelled points on a log-x plane."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from vgen.viz.sheets import INK, PAPER, font

COLOURS = ("#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6", "#dd4477", "#66aa00", "#b82e2e", "#316395")


def scatter(
    points: Sequence[tuple[float, float, str]],
    x_name: str,
    y_name: str,
    title: str,
    size: tuple[int, int] = (1100, 720),
) -> Image.Image:
    """Points (x, y, label) with a base-2 logarithmic x axis (x > 0). Labels up to a comma share a colour and a line."""
    width, height = size
    left, right, top, bottom = 80, width - 30, 60, height - 70
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    xs, ys = [math.log2(p[0]) for p in points], [p[1] for p in points]
    x_low, x_high = math.floor(min(xs)), math.ceil(max(xs)) + 0.6
    y_step = _tick(max(ys) - min(ys))
    y_low, y_high = y_step * math.floor(min(ys) / y_step), y_step * math.ceil(max(ys) / y_step)
    y_high += y_step * (y_high == y_low)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (right - left),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
        )

    draw.text((width / 2, 18), title, INK, font(22), anchor="mt")
    draw.text(((left + right) / 2, height - 14), x_name, INK, font(16), anchor="ms")
    draw.text((14, top - 12), y_name, INK, font(16), anchor="ls")
    for exponent in range(math.ceil(x_low), math.floor(x_high) + 1):
        x, _ = place(exponent, y_low)
        draw.line((x, top, x, bottom), "#e4e4e4")
        draw.text((x, bottom + 8), str(2**exponent), INK, font(14), anchor="mt")
    for tick in range(round((y_high - y_low) / y_step) + 1):
        value = y_low + tick * y_step
        _, y = place(x_low, value)
        draw.line((left, y, right, y), "#e4e4e4")
        draw.text((left - 8, y), f"{value:g}", INK, font(14), anchor="rm")

    groups: dict[str, list[tuple[float, float, str]]] = {}
    for point, x in zip(points, xs):
        groups.setdefault(point[2].split(",")[0], []).append((x, point[1], point[2]))
    for index, (name, members) in enumerate(groups.items()):
        colour = COLOURS[index % len(COLOURS)]
        spots = [place(x, y) for x, y, _ in sorted(members)]
        if len(spots) > 1:
            draw.line(spots, colour, width=2)
        for x, y in spots:
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), colour)
        x, y = spots[-1]
        draw.text((x - 4, y - 10), name, colour, font(14), anchor="rs")
    return page


def _tick(span: float) -> float:
    """A round step (1, 2 or 5 times a power of ten) that cuts `span` into about six."""
    raw = max(span, 1e-6) / 6
    power = 10 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
