"""Sheets, traces and plots: sizes, blank cells, files that are whole or absent."""

import pytest
import torch
from PIL import Image

from vgen.errors import VgenError
from vgen.samplers.types import Canvas, Step
from vgen.viz.curves import scatter
from vgen.viz.sheets import columns_for, sheet
from vgen.viz.trace import BLANK, Trace, save_trace


def pictures(count, side=8):
    return [Image.new("RGB", (side, side), (10 * i, 0, 0)) for i in range(count)]


def test_sheet_places_pictures_in_rows():
    page = sheet(pictures(5), columns=3, gap=2)
    assert page.size == (3 * 10 + 2, 2 * 10 + 2)
    assert page.getpixel((2 + 10 + 4, 2 + 10 + 4)) == (40, 0, 0)  # picture 4: second row, second column
    assert columns_for(16) == 4 and columns_for(5) == 3


def test_labels_and_title_take_room():
    plain, labelled = sheet(pictures(4)), sheet(pictures(4), ["a very long caption indeed"] * 4, title="title")
    assert labelled.height > plain.height and labelled.width == plain.width


def trace_of(steps):
    trace, canvas = Trace(limit=2), Canvas.blank((1, 2, 2), 3)
    for index in range(steps):
        canvas.write(torch.tensor([index]), torch.ones(3, 1, dtype=torch.long), None, 1)
        step = Step(index, torch.tensor([index]), 1, (4 - index, 3 - index), steps, 4)
        trace(None, index, step, {"canvas": canvas})
    return trace, canvas


def test_trace_blanks_what_is_not_decoded_and_keeps_the_first_batch():
    trace, canvas = trace_of(3)
    trace(None, 0, Step(0, torch.tensor([0]), 1, (4, 3), 3, 4), {"canvas": canvas})  # a second batch begins
    assert len(trace.states) == 3
    frames = trace.frames(lambda values, level: pictures(len(values)), scale=1)
    assert len(frames) == 3
    colours = {colour for _, colour in frames[0].getcolors(100000)}
    assert BLANK in colours


def test_animation_files(tmp_path):
    save_trace(pictures(3), tmp_path / "a.gif")
    assert Image.open(tmp_path / "a.gif").n_frames == 3
    with pytest.raises(VgenError, match=r"\.gif or \.webp"):
        save_trace(pictures(3), tmp_path / "a.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


def test_scatter_draws_every_group():
    page = scatter([(1, 10, "a"), (4, 30, "b, 4 steps"), (8, 35, "b, 8 steps")], "calls", "share", "title")
    colours = {colour for _, colour in page.getcolors(100000)}
    assert (0x33, 0x66, 0xCC) in colours and (0xDC, 0x39, 0x12) in colours
    assert scatter([(1, 10, "a")], "x", "y", "one point").size == page.size
