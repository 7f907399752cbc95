"""Heat maps and animations of orders."""

import numpy as np
import pytest
from PIL import Image

from vgen.errors import VgenError
from vgen.samplers.orders import make_order
from vgen.viz.orders import EMPTY, NOW, _Panel, animate, colour_map, plot, plot_all


def test_colour_map_runs_from_dark_to_bright():
    colours = colour_map(np.array([0.0, 0.5, 1.0, 2.0]))
    assert colours.dtype == np.uint8
    assert colours[0].tolist() == [0x44, 0x01, 0x54]
    assert colours[2].tolist() == colours[3].tolist() == [0xFD, 0xE7, 0x25]
    brightness = colour_map(np.linspace(0, 1, 32)).sum(axis=1)
    assert (np.diff(brightness.astype(int)) > 0).all()


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 3, 7), (3, 4, 4), (1, 1, 100), (1, 1, 1), (20, 2, 2), (1, 64, 2)])
def test_every_cell_has_the_colour_of_its_call(grid):
    order = make_order("neighbor", grid)
    image, panel = plot(order), _Panel(order)
    boxes = [panel.box(position) for position in range(len(panel.ids))]
    assert len(set(boxes)) == len(boxes)
    for box, colour in zip(boxes, panel.colours):
        assert box[0] >= 0
        assert box[2] < image.width
        assert box[3] < image.height
        assert image.getpixel(box[:2]) == colour  # the corner: numbers stand in the middle


def test_plots_are_written_and_grow_with_the_orders(tmp_path):
    orders = [make_order(name, (1, 4, 4)) for name in ("raster", "random", "confidence-3")]
    sheet = plot_all(orders, tmp_path / "all.png", columns=3)
    with Image.open(tmp_path / "all.png") as read:
        assert read.size == sheet.size
    one = plot(orders[0], tmp_path / "one.webp")
    assert sheet.width == 3 * one.width
    assert (tmp_path / "one.webp").stat().st_size > 0


def test_animation_shows_the_calls_in_turn(tmp_path):
    order = make_order("blocks-2", (1, 4, 4))
    animate(order, tmp_path / "order.gif", seconds=1)
    panel = _Panel(order)
    corners = [panel.box(position)[:2] for position in (0, 2, 8, 10)]  # one of each block

    def close(pixel, colour):
        return max(abs(a - b) for a, b in zip(pixel, colour)) <= 6  # a palette of 256

    with Image.open(tmp_path / "order.gif") as gif:
        assert gif.n_frames == order.calls + 1
        for done in range(order.calls + 1):
            gif.seek(done)
            picture = gif.convert("RGB")
            for call, corner in enumerate(corners):
                expected = panel.colours[panel.ids.tolist().index(call)]
                if call >= done:
                    expected = EMPTY
                elif call == done - 1 and done < order.calls:
                    expected = NOW
                assert close(picture.getpixel(corner), expected), (done, call)


def test_long_animations_skip_pictures(tmp_path):
    animate([make_order("raster", (1, 16, 16)), make_order("blocks-8", (1, 16, 16))], tmp_path / "two.gif", seconds=1)
    with Image.open(tmp_path / "two.gif") as gif:
        assert 60 < gif.n_frames <= 101


def test_bad_paths_and_nothing_to_draw(tmp_path):
    order = make_order("raster", (1, 2, 2))
    with pytest.raises(VgenError, match=r"\.gif"):
        animate(order, tmp_path / "x.png")
    with pytest.raises(VgenError, match=r"\.png"):
        plot(order, tmp_path / "x.txt")
    with pytest.raises(VgenError, match="no order"):
        plot_all([])
    assert not list(tmp_path.iterdir())
