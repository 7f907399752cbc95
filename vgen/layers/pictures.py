"""The one way in for pictures: files, bytes, PIL images, arrays and tensors become upright 8-bit RGB on white.

Datasets, `reconstruct`, init images, masks and dialogues all read through here, so a picture means the same wherever it enters:

- the first frame, turned as its EXIF or XMP orientation says (phones store pictures sideways)
- transparency, that of palettes and of one colour too, laid on white
- 16-bit grey scaled by 65535; float grey by the smallest of 1, 255 and 65535 that its values reach (`_float_range`)
- CMYK as Pillow converts it; colour profiles are not applied

This module does not import torch, so that commands can refuse a file before they load anything.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
from PIL import Image, UnidentifiedImageError

from vgen.errors import VgenError, first_line

if TYPE_CHECKING:
    from torch import Tensor

# np.ndarray: [H, W], [H, W, 1], [H, W, 2 | 4] (with alpha) or [H, W, 3]; uint8, uint16, bool, or floats in [0, 1].
# Tensor: [C, H, W] with as many channels, or [H, W]; uint8, bool, or floats in [-1, 1], as vgen's own pixels.
Picture = Union[str, PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, "Tensor"]

ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(source: Picture, what: str = "picture") -> Image.Image:
    """Any picture -> RGB, as the module says. what: its part in the message of an error ("init image").

    Raises VgenError for a file that is missing, no picture, broken, cut off or absurdly large, and for arrays of other shapes or ranges.
    """
    return to_rgb(open_upright(source, what), what)


def open_upright(source: Picture, what: str = "picture") -> Image.Image:
    """The picture loaded and upright in the mode it is stored in, transparency included: what masks are read from."""
    if isinstance(source, Image.Image):
        with _as_sentence(what):
            return _upright(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decoded(io.BytesIO(source), what)
    if isinstance(source, (str, PathLike)):
        path = Path(source)
        name = f"{what} {path}"
        if path.is_dir():
            raise VgenError(f"the {name} is a folder, expected a file")
        try:
            contents = path.read_bytes()
        except FileNotFoundError:
            raise VgenError(f"there is no image file {path} (the {what})") from None
        except (OSError, ValueError) as error:
            raise VgenError(f"the {name} cannot be read ({first_line(error)})") from None
        return _decoded(io.BytesIO(contents), name)
    if isinstance(source, np.ndarray):
        return _of_array(source, what)
    if hasattr(source, "detach"):
        return _of_tensor(source, what)
    raise VgenError(
        f"the {what} is a path, bytes, a PIL image, a numpy array [H, W, C] or a torch tensor [C, H, W], got a {type(source).__name__}"
    )


def to_rgb(image: Image.Image, what: str = "picture") -> Image.Image:
    """A PIL image -> upright RGB without metadata: transparency on white, 16-bit and float grey scaled. Raises VgenError if it is broken."""
    with _as_sentence(what):
        image = _upright(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _grey(image)
        if image.mode in ("La", "RGBa"):
            image = image.convert(image.mode.upper())
        if image.has_transparency_data:
            image = image.convert("RGBA")
            page = Image.new("RGBA", image.size, "white")
            page.alpha_composite(image)
            image = page
        image = image.convert("RGB")
        image.info = {}
        return image


def _decoded(file: io.BytesIO, name: str) -> Image.Image:
    with _as_sentence(name), Image.open(file) as image:
        return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """Loads and turns. A copy that says so no more, as whoever reads it next would turn it again; untouched where nothing is to turn."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except (
        Exception
    ):  # a damaged EXIF block says nothing; the pixels may be fine, and Pillow raises everything from SyntaxError on
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in [key for key in turned.info if key == "exif" or key.lower().endswith("xmp")]:
        del turned.info[key]
    return turned


def _grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey as 8 bits; the transparent value of a 16-bit PNG as alpha."""
    values = np.asarray(image)
    clear = image.info.get("transparency")
    kind = _float_range(values) if image.mode == "F" else _integer_range(values)
    grey = Image.fromarray(_scaled(values, kind))
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _scaled(values: np.ndarray, whole: float) -> np.ndarray:
    """Numbers from 0 to `whole` -> uint8, rounded; others are clipped, NaN is black."""
    return np.nan_to_num(values * (255.0 / whole), nan=0.0).round().clip(0, 255).astype(np.uint8)


def _float_range(values: np.ndarray) -> float:
    """What is white in a float picture: 1, 255 or 65535, the smallest that its largest value does not exceed twice.

    Files do not say. Twice, because resampling overshoots and highlights lie above white; a picture that is misread by this
    has no value above 2 of 255, or 510 of 65535: it is black to the eye either way.
    """
    finite = values[np.isfinite(values)]
    top = finite.max() if finite.size else 0
    return next((whole for whole in (1, 255) if top <= 2 * whole), 65535)


def _integer_range(values: np.ndarray) -> float:
    """65535 (16-bit files open so), or 2^31 - 1 where 32-bit values lie above it."""
    return 65535 if values.size == 0 or values.max() <= 65535 else 2**31 - 1


def _of_array(array: np.ndarray, what: str) -> Image.Image:
    """[H, W] or [H, W, C] -> a PIL image of C channels."""
    channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if channels not in (1, 2, 3, 4) or array.size == 0:
        raise VgenError(
            f"an array {what} has the shape [H, W] or [H, W, C] with 1 to 4 channels, got {list(array.shape)}"
        )
    if array.dtype == np.bool_:
        array = _scaled(array, 1)
    elif array.dtype == np.uint16:
        array = _scaled(array, 65535)
    elif np.issubdtype(array.dtype, np.floating):
        _check_range(array, 0, 1, what)
        array = _scaled(array, 1)
    elif array.dtype != np.uint8:
        raise VgenError(
            f"an array {what} holds uint8, uint16, bool, or floats in [0, 1], got {array.dtype}; convert it"
        )
    array = np.ascontiguousarray(array.reshape(*array.shape[:2], channels))
    return Image.fromarray(array[:, :, 0] if channels == 1 else array)


def _of_tensor(tensor: Tensor, what: str) -> Image.Image:
    """[H, W] or [C, H, W] -> a PIL image of C channels; floats are in [-1, 1]."""
    if tensor.dim() not in (2, 3):
        raise VgenError(f"a tensor {what} has the shape [H, W] or [C, H, W], got {list(tensor.shape)}")
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        array = tensor.float().numpy()
        _check_range(array, -1, 1, what)
        array = _scaled(array + 1, 2)
    else:
        array = tensor.numpy()
    return _of_array(array if array.ndim == 2 else array.transpose(1, 2, 0), what)


def _check_range(values: np.ndarray, low: float, high: float, what: str) -> None:
    least, most = float(values.min()), float(values.max())
    if not (low - 1e-3 <= least and most <= high + 1e-3):  # also NaN
        raise VgenError(f"floats of the {what} lie in [{low}, {high}], found {least:.4g} to {most:.4g}; scale them")


@contextmanager
def _as_sentence(name: str) -> Iterator[None]:
    """Whatever Pillow raises becomes one sentence; its warnings are silenced (large pictures: phones reach 200 megapixels; odd metadata)."""
    try:
        with warnings.catch_warnings():
            for kind in (Image.DecompressionBombWarning, UserWarning):
                warnings.simplefilter("ignore", kind)
            yield
    except VgenError:
        raise
    except Image.DecompressionBombError as error:
        raise VgenError(
            f"the {name} unpacks to more pixels than is safe ({first_line(error)}); make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except UnidentifiedImageError as error:
        raise VgenError(
            f"the {name} is not an image that can be read: it is of no format that Pillow knows here; use PNG, JPEG, WebP, TIFF or GIF"
        ) from error
    except MemoryError as error:
        raise VgenError(f"the {name} does not fit into memory; make it smaller") from error
    except Exception as error:  # decoders raise everything from SyntaxError to struct.error at broken files
        raise VgenError(
            f"the {name} is not an image that can be read: it is broken or cut off ({first_line(error)})"
        ) from error
