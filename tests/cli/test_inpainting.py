"""`vgen sample` with pictures to start from."""

import argparse

import numpy as np
import pytest
from PIL import Image

from vgen.cli.arguments import margins
from vgen.cli.main import main


@pytest.fixture
def files(tmp_path):
    """Paths of a picture of 8x8 pixels and of a mask whose right half is white."""
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (4, 0, 8, 8))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "picture.png", tmp_path / "mask.png"


def made(pipeline_folder, tmp_path, *arguments):
    out = tmp_path / "made.png"
    words = ["sample", "--model", str(pipeline_folder), "--prompt", "red apple", "--device", "cpu", "--out", str(out)]
    assert main([*words, *map(str, arguments)]) == 0
    return np.asarray(Image.open(out))


def test_kept_pixels_come_back_unless_asked_not_to(pipeline_folder, files, tmp_path):
    picture, mask = files
    original = np.asarray(Image.open(picture))
    pasted = made(pipeline_folder, tmp_path, "--init-image", picture, "--mask", mask)
    assert np.array_equal(pasted[:, :2], original[:, :2])
    plain = made(pipeline_folder, tmp_path, "--init-image", picture, "--mask", mask, "--no-paste-back")
    assert not np.array_equal(plain[:, :2], original[:, :2]) and np.array_equal(plain[:, 4:], pasted[:, 4:])


def test_new_margins(pipeline_folder, files, tmp_path):
    original = Image.open(files[0]).crop((0, 0, 6, 4))
    original.save(tmp_path / "small.png")
    picture = made(pipeline_folder, tmp_path, "--init-image", tmp_path / "small.png", "--outpaint", "0,0,2,100%")
    # Two pixels, the cell beside what is new, are seam.
    assert np.array_equal(picture[:2, :4], np.asarray(original)[:2, :4])


def test_margins_are_pixels_or_shares():
    assert margins("1, 2,3,40") == (1, 2, 3, 40) and all(isinstance(side, int) for side in margins("7"))
    assert margins("25%,0,12.5%,0") == (0.25, 0, 0.125, 0) and margins("7") == (7, 7, 7, 7)
    for text in ("", "1,2", "-1,0,0,0", "1.5", "a", "1,2,3,4,5", "١", "5px", "%"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected LEFT,TOP,RIGHT,BOTTOM"):
            margins(text)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--init-image", "picture.png"], "both an init image and a mask"),
        (["--outpaint", "4"], "outpainting an init image and margins"),
        (["--init-image", "mask.png", "--mask", "cut.png"], "the mask cut.png is not an image that can be read"),
        (["--init-image", "picture.png", "--outpaint", "0"], "margins add nothing"),
    ],
)
def test_mistakes_are_one_sentence(pipeline_folder, files, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(files[0].parent)
    (files[0].parent / "cut.png").write_bytes(files[1].read_bytes()[:45])
    assert main(["sample", "--model", str(pipeline_folder), "--prompt", "a cat", "--device", "cpu", *arguments]) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1
