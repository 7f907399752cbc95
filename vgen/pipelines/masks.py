"""What in- and outpainting reads: a picture, and which pixels of it are to be made anew. Without torch, for checks before it is loaded."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vgen.errors import VgenError
from vgen.layers.pictures import Picture, open_picture, open_upright, to_rgb

WHITE = 128  # of 255: what is at least so light is white
ALIKE = 8  # levels, mean: how far an erased copy of a picture may be from it (WebP files that are not lossless)
PLAIN = 0.95  # share of a mask's opaque pixels that are black or white; the rest are soft edges


def read_parts(
    image: Picture | None, mask: Picture | None, outpaint: object | None
) -> tuple[Image.Image, np.ndarray] | None:
    """The picture as RGB and what is new in it, bool [H, W]; None without image, mask and margins.

    Raises VgenError for a part that is missing or cannot be read (`read_mask`), and for a mask without white where there are no margins.
    """
    if image is None and mask is None and outpaint is None:
        return None
    if image is None or (mask is None and outpaint is None):
        raise VgenError(
            "inpainting needs both an init image and a mask (white: make anew, black: keep), outpainting an init image and margins"
        )
    picture = open_picture(image, "init image")
    fresh = np.zeros(picture.size[::-1], bool) if mask is None else read_mask(mask, picture)
    if outpaint is None and not fresh.any():
        raise VgenError(
            "the mask has no white area, so there is nothing to make; paint what should be made anew white (128 of 255 and more; "
            "a mask of the numbers 0 and 1 is black all over)"
        )
    return picture, fresh


def read_mask(source: Picture, picture: Image.Image) -> np.ndarray:
    """Bool [H, W], True where the picture (RGB, of the same size) is to be made anew: the light half of the mask's levels.

    Noise of JPEG and WebP files stays on its side of the middle. Where a mask is transparent in some places and opaque in others
    (alpha 128 and more), it says nothing by the colour of transparent pixels:
    - a copy of the picture with areas erased: the erased areas are made anew
    - black and white, or white alone, on transparency: only white is made anew
    - black alone on transparency: the transparent area is made anew, as black stays
    - anything else is refused.
    Raises VgenError also for other sizes and for masks that cannot be read.
    """
    image = open_upright(source, "mask")
    if image.size != picture.size:
        raise VgenError(
            f"the init image is {picture.size[0]}x{picture.size[1]}, its mask {image.size[0]}x{image.size[1]}; make them the same size"
        )
    if image.has_transparency_data and image.mode[0] not in "IF":
        values = np.asarray(image.convert("RGBA"))
        opaque = values[..., 3] >= WHITE
        colours = Image.fromarray(np.ascontiguousarray(values[..., :3]))
        if opaque.any() and not opaque.all():
            return _on_transparency(np.asarray(colours), opaque, np.asarray(picture))
        return _light(colours)
    return _light(to_rgb(image, "mask"))


def _light(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")) >= WHITE


def _on_transparency(colours: np.ndarray, opaque: np.ndarray, picture: np.ndarray) -> np.ndarray:
    shown = colours[opaque].astype(np.int16)
    white, black = (shown > 191).all(axis=-1), (shown < 64).all(axis=-1)
    if np.abs(shown - picture[opaque]).mean() <= ALIKE and (white | black).mean() < 1:
        return ~opaque
    if (white | black).mean() < PLAIN:
        raise VgenError(
            "the mask is transparent in places, and what is painted on it is neither black and white nor the init image with an area "
            "erased; save it without transparency, white where the picture is to be made anew and black where it stays"
        )
    return opaque & _light(Image.fromarray(colours)) if white.any() else ~opaque
