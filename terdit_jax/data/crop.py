"""From the bytes of a picture file to the centre crop that models are trained on: decoding, 8 bits, resizing.

Where the bytes lie belongs to the sources, what becomes of the pixels to the codecs.
"""

import ctypes
import io
import logging
import warnings

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

# The formats that Pillow decodes by itself; others (EPS) would start outside programs on untrusted files.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_ASPECT_RATIO = 100  # the resized picture before the crop holds this many crops at most

# Pillow loads these two only when a file asks for them, together with every format that is not wanted here.
_LOADED_WITH_PILLOW = (TiffImagePlugin, WebPImagePlugin)


class PictureError(Exception):
    """A picture that cannot be used; the message says why, in one line."""


def decode_picture(data: bytes, size: int, channels: int) -> np.ndarray:
    """The centre crop of a picture file as (size, size, channels) uint8: RGB or, with one channel, grey.

    What Pillow's `convert` makes of it: alpha is dropped, CMYK and palettes are resolved, EXIF orientation and colour
    profiles are ignored; of an animation the first frame. Where Pillow would clip deeper grey at 255, it is scaled:
    16 bits (and 12 in TIFF) keep their high byte, as they do in colour; 32-bit integers are read as 16 bits and
    floats as 0 to 1, and values beyond that are refused.

    Raises:
      PictureError: not a whole picture in one of `FORMATS`, or one too large, too elongated or too deep.
    """
    if not data:
        raise PictureError("the file is empty")
    mode = "RGB" if channels == 3 else "L"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_size(picture)
            picture = _scale_grey(picture).convert(mode)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(f"not a picture in any of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # on broken files decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise PictureError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    return np.asarray(centre_crop(picture, size)).reshape(size, size, channels)  # H, W, C


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The centre (size, size) of the picture scaled to `size` on its shorter side.

    Halved with a box filter while the shorter side is at least twice `size`, then resized bicubically: the crop of
    the ADM and DiT codes (Dhariwal & Nichol 2021; Peebles & Xie 2023), on which their FID numbers rest.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    resized = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(resized, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _check_size(picture: Image.Image) -> None:
    width, height = picture.size
    if min(width, height) < 1:
        raise PictureError(f"{width}x{height} holds no pixels")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise PictureError(f"{width}x{height} exceeds {Image.MAX_IMAGE_PIXELS} pixels, a decompression bomb perhaps")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise PictureError(f"{width}x{height} is too elongated to crop")


def _scale_grey(picture: Image.Image) -> Image.Image:
    """Grey deeper than 8 bits scaled to mode L; any other picture as it is."""
    if picture.mode not in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        return picture
    values = np.asarray(picture)  # H, W
    if picture.mode == "F":
        _check_range(values, 1)
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if picture.mode == "I":
        _check_range(values, 2**16 - 1)
    bits = 16
    if picture.mode != "I" and isinstance(picture, TiffImagePlugin.TiffImageFile):
        bits = picture.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0]
        if picture.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0) == 0:  # white is zero
            values = 2**bits - 1 - values
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))


def _check_range(values: np.ndarray, top: int) -> None:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise PictureError(f"grey values from {low} to {high}: only 0 to {top} can be scaled to 8 bits")


def _silence_decoders() -> None:
    """Turns off what Pillow and libtiff write about broken files: the PictureError says it, once and in its place."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # found through Pillow's own link to libtiff
    except (AttributeError, OSError):
        pass  # a Pillow without libtiff, or a system that does not look through links


_silence_decoders()
