"""The one reader of image files: bytes to 8 bits a channel, the same for every command that opens images.

Cropping belongs to `crop`; which files are read belongs to the sources.
"""

import ctypes
import io
import logging
import os
import warnings

from etils import epath
import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

# The formats that Pillow decodes by itself; others (EPS) would start outside programs on untrusted files.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

MAX_FILE_BYTES = 2**30  # no image of as many pixels as are decoded has more

# Pillow loads these two only when a file asks for them, together with every format that is not wanted here.
_LOADED_WITH_PILLOW = (TiffImagePlugin, WebPImagePlugin)

_DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_STEPS = {"LAB": "RGB", "La": "LA"}  # modes that Pillow converts to grey, or at all, by way of another only


class ImageError(Exception):
    """An image that cannot be used; the message says why, in one line."""


def read_file(path: epath.PathLike) -> bytes:
    """The content of an image file. Raises ImageError if it cannot be read or is too large for one."""
    try:
        with epath.Path(path).open("rb") as file:
            if (size := file.seek(0, os.SEEK_END)) > MAX_FILE_BYTES:
                raise ImageError(f"has {size:,} bytes, too many for an image")
            file.seek(0)
            return file.read()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error


def decode_image(data: bytes, channels: int) -> Image.Image:
    """Decodes the content of an image file to mode RGB or, with one channel, L.

    The result is that of Pillow's `convert`: alpha is dropped, CMYK and palettes are resolved, colour profiles and EXIF
    orientation (but not TIFF's) are ignored; of an animation the first frame. Where Pillow would clip deeper grey at
    255, it is scaled: 16 bits (and 12 in TIFF) keep their high byte, as they do in colour; 32-bit integers are read as
    16 bits and floats as 0 to 1, and values beyond that are refused.

    Raises:
      ImageError: not a whole image in one of `FORMATS`, or one too large or too deep.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image)
            return to_8_bits(image, channels)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image in any of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # on broken files decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def to_8_bits(image: Image.Image, channels: int) -> Image.Image:
    """An image of any of Pillow's modes in mode RGB or, with one channel, L. Raises ImageError if it is too deep."""
    if image.mode in _DEEP_GREY:
        image = _scale_grey(image)
    if image.mode in _STEPS:
        image = image.convert(_STEPS[image.mode])
    return image.convert("RGB" if channels == 3 else "L")


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise ImageError(f"{width}x{height} holds no pixels")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(f"{width}x{height} exceeds {Image.MAX_IMAGE_PIXELS} pixels, a decompression bomb perhaps")


def _scale_grey(image: Image.Image) -> Image.Image:
    """Grey deeper than 8 bits scaled to mode L."""
    values = np.asarray(image)  # H, W
    if image.mode == "F":
        _check_range(values, 1)
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.mode == "I":
        _check_range(values, 2**16 - 1)
    bits = 16
    if image.mode != "I" and isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0]
        if image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0) == 0:  # white is zero
            values = 2**bits - 1 - values
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))


def _check_range(values: np.ndarray, top: int) -> None:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise ImageError(f"grey values from {low} to {high}: only 0 to {top} can be scaled to 8 bits")


def _silence_decoders() -> None:
    """Turns off what Pillow and libtiff write about broken files: the ImageError says it, once and in its place."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # found through Pillow's own link to libtiff
    except (AttributeError, OSError):
        pass  # a Pillow without libtiff, or a system that does not look through links


_silence_decoders()
