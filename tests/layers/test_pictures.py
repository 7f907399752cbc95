"""The one way in for pictures: what every kind of file, array and tensor becomes, and what is refused in one sentence."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from vgen.errors import VgenError
from vgen.layers.pictures import ORIENTATION, open_picture
from vgen.layers.pixels import centre_square, to_images, to_pixels


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def marked(width=8, height=4):
    """Black with a red upper left quarter: tells every turn from every other."""
    image = Image.new("RGB", (width, height))
    image.paste("red", (0, 0, width // 4, height // 2))
    return image


@pytest.mark.parametrize("tag", range(1, 9))
def test_every_orientation_is_undone_and_only_once(tag):
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    contents = encoded(marked(), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(contents)))
    made = open_picture(contents)
    assert made.size == expected.size and made.tobytes() == expected.tobytes()
    assert open_picture(made).tobytes() == made.tobytes()
    stored = Image.open(io.BytesIO(contents))
    assert torch.equal(to_pixels(stored), to_pixels(made))
    assert stored.getexif()[ORIENTATION] == tag and stored.size == (8, 4), "the caller's image is left alone"


def test_squares_are_cut_out_of_upright_pictures():
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    upside_down = Image.open(io.BytesIO(encoded(marked(8, 8), exif=exif)))
    assert centre_square(upside_down, 8).getpixel((7, 7)) == (255, 0, 0)


def test_a_tiff_that_turns_itself_is_not_turned_twice():
    info = ImageFileDirectory_v2()
    info[ORIENTATION] = 6
    made = open_picture(encoded(marked(), "TIFF", tiffinfo=info))
    assert made.size == (4, 8) and made.getpixel((3, 0)) == (255, 0, 0)


def test_damaged_exif_does_not_cost_the_picture(recwarn):
    contents = encoded(marked(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    assert open_picture(contents).size == (8, 4) and not recwarn.list


@pytest.mark.parametrize(
    "values, whites",
    [
        ([0, 0.5, 1], 1),
        ([0, 0.5, 1.4], 1),
        ([-3, 0.5, 1], 1),
        ([np.nan, np.inf, 1], 1),
        ([0, 100, 255], 255),
        ([0, 100, 261.5], 255),
        ([0, 20000, 65535], 65535),
    ],
)
def test_float_tiffs_are_scaled_by_what_they_hold(values, whites):
    image = Image.fromarray(np.array([values], np.float32))
    made = np.asarray(open_picture(encoded(image, "TIFF")))[0, :, 0]
    expected = np.clip(np.nan_to_num(np.array(values, np.float64), nan=0, posinf=1e9) / whites, 0, 1) * 255
    assert np.abs(made - expected).max() <= 0.5


def test_sixteen_bits_and_their_transparent_value():
    grey = np.array([[0, 257 * 9, 65535]], np.uint16)
    assert np.asarray(open_picture(encoded(Image.fromarray(grey))))[0, :, 0].tolist() == [0, 9, 255]
    clear = Image.open(io.BytesIO(encoded(Image.fromarray(grey), transparency=0)))
    assert clear.info["transparency"] == 0
    assert np.asarray(open_picture(clear))[0, :, 0].tolist() == [255, 9, 255]
    wide = Image.fromarray(np.array([[0, 2**31 - 1]], np.int32))
    assert np.asarray(open_picture(wide))[0, :, 0].tolist() == [0, 255]


def test_one_picture_in_every_form_is_the_same(tmp_path):
    image = marked()
    array = np.asarray(image)
    (tmp_path / "a.png").write_bytes(encoded(image))
    forms = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        encoded(image),
        bytearray(encoded(image)),
        image,
        array,
        array / np.float32(255),
        array.astype(np.float64) / 255,
        (array > 0),
        array.astype(np.uint16) * 257,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        to_pixels(image),
        to_pixels(image).bfloat16(),
        np.asarray(image.convert("RGBA")),
    ]
    for form in forms:
        assert open_picture(form).tobytes() == image.tobytes()
    assert to_images(to_pixels(image)[None])[0].tobytes() == image.tobytes()
    grey = np.full((4, 8), 7, np.uint8)
    assert all(open_picture(form).getpixel((0, 0)) == (7, 7, 7) for form in (grey, grey[..., None], torch.tensor(grey)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa"])
def test_transparency_of_every_mode_is_white(mode):
    image = Image.new("RGBA", (2, 1), (200, 200, 200, 0))
    image.putpixel((1, 0), (200, 200, 200, 255))
    stored = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    assert [open_picture(stored).getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (200,) * 3]


def test_transparency_of_palettes_is_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    for transparency in (0, bytes([0, 255])):
        made = open_picture(encoded(palette, transparency=transparency))
        assert [made.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]
    with_alpha = palette.convert("PA")
    with_alpha.putpixel((0, 0), (1, 0))
    assert [open_picture(with_alpha).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]


def noisy():
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_files_that_are_cut_off_are_one_sentence(kind, tmp_path):
    contents = encoded(noisy(), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(contents[: len(contents) // 2])
    with pytest.raises(VgenError, match="is not an image that can be read") as error:
        open_picture(path, "init image")
    assert "\n" not in str(error.value) and str(path) in str(error.value) and "init image" in str(error.value)
    if kind != "WEBP":  # which is decoded when it is opened
        with pytest.raises(VgenError, match="is not an image that can be read"):
            to_pixels(Image.open(path))


def test_too_many_pixels_are_one_sentence_and_many_are_silent(monkeypatch, recwarn):
    contents = encoded(noisy())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    assert open_picture(contents).size == (64, 64) and not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(VgenError, match="more pixels than is safe"):
        open_picture(contents)


@pytest.mark.parametrize(
    "source, words",
    [
        ("/nowhere/a.png", "there is no image file /nowhere/a.png"),
        ("a\0b.png", "cannot be read"),
        ("/", "is a folder"),
        (b"", "of no format"),
        (b"<svg/>", "of no format"),
        (3, "got a int"),
        (None, "got a NoneType"),
        (np.zeros((2, 2, 5), np.uint8), r"\[2, 2, 5\]"),
        (np.zeros((0, 2, 3), np.uint8), r"\[0, 2, 3\]"),
        (np.zeros((2, 2, 3), np.int64), "int64"),
        (np.full((2, 2), 255.0), r"lie in \[0, 1\], found 255"),
        (np.full((2, 2), np.nan), "found nan"),
        (torch.zeros(1, 3, 2, 2), r"\[1, 3, 2, 2\]"),
        (torch.full((3, 2, 2), 255.0), r"lie in \[-1, 1\], found 255"),
        (torch.zeros(3, 2, 2, dtype=torch.long), "int64"),
    ],
)
def test_what_is_no_picture_is_one_sentence(source, words):
    with pytest.raises(VgenError, match=words) as error:
        open_picture(source)
    assert "\n" not in str(error.value)


def test_files_can_be_refused_before_torch_is_loaded():
    code = "import sys; import vgen.layers.pictures; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
