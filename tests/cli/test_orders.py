"""`vgen orders`."""

import pytest
from PIL import Image

from vgen.cli.main import main
from vgen.cli.orders import GALLERY, VIDEO_GALLERY
from vgen.samplers.orders import ORDERS, read_order


def test_the_gallery_shows_every_order_that_needs_no_file():
    assert {read_order(name)[0] for name in VIDEO_GALLERY} == set(ORDERS) - {"given"}
    assert set(GALLERY) <= set(VIDEO_GALLERY)


def test_table_and_pictures(tmp_path, capsys):
    out, gif = tmp_path / "orders.png", tmp_path / "orders.gif"
    assert main(["orders", "--grid", "1x6x6", "--out", str(out), "--gif", str(gif)]) == 0
    printed = capsys.readouterr().out
    calls = {line.split()[0]: line.split()[1] for line in printed.splitlines()[1:12]}
    assert calls["raster"] == "36"
    assert calls["neighbor"] == "11"
    assert calls["regions-4"] == "12"
    assert "left out: regions-16" in printed  # 16 rectangles do not fit 6x6
    with Image.open(out) as sheet, Image.open(gif) as film:
        assert sheet.width > 600
        assert film.n_frames == 37


def test_chosen_orders_with_options(capsys):
    assert main(["orders", "--grid", "8x8", "--order", "random:steps=5", "--order", "zip-2", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["random-5", "5"], ["zip-2", "22"]]


def test_given_file(tmp_path, capsys):
    (tmp_path / "order.txt").write_text("3 2\n1 0\n")
    assert main(["orders", "--grid", "2x2", "--order", f"given:source={tmp_path / 'order.txt'}"]) == 0
    assert " 4 " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--grid", "3xx"],
        ["--grid", "0x4"],
        ["--grid", "1x2x3x4"],
        ["--order", "rastr"],
        ["--order", "regions-3"],
        ["--order", "random:steps=many"],
        ["--order", "given:source=missing.json"],
        ["--grid", "2x2", "--order", "raster", "--out", "picture.foo"],
        ["--grid", "2x2", "--order", "raster", "--gif", "film.mp4"],
    ],
)
def test_mistakes_are_one_sentence(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["orders", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vgen orders: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
