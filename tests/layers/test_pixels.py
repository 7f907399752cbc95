"""Pixels: the round trip is exact, transparency lies on white."""

import torch
from PIL import Image

from vgen.layers.pixels import to_images, to_pixels


def test_round_trip_is_exact():
    image = Image.frombytes("RGB", (16, 16), bytes(range(256)) * 3)
    pixels = to_pixels(image)
    assert pixels.shape == (3, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    assert to_images(pixels[None])[0].tobytes() == image.tobytes()
    assert to_images(torch.full((1, 3, 2, 2), 7.0))[0].getpixel((0, 0)) == (255, 255, 255)


def test_other_modes():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert (to_pixels(clear) == 1).all()
    assert to_pixels(Image.new("L", (2, 2), 0)).shape == (3, 2, 2)
    palette = Image.new("RGB", (2, 2), "red").convert("P")
    assert to_pixels(palette)[:, 0, 0].tolist() == [1, -1, -1]
