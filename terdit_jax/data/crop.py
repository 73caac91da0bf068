"""The centre crop that models are trained on.

Decoding belongs to `image_file`, where the bytes lie to the sources, what becomes of the pixels to the codecs.
"""

import numpy as np
from PIL import Image

from terdit_jax.data.image_file import ImageError, decode_image
from terdit_jax.errors import UserError

MAX_SIZE = 2048  # of a crop: a batch of 64 in float32, with its spreads, then takes 6 GB
MAX_ASPECT_RATIO = 100  # the resized image before the crop holds this many crops at most
MAX_RESIZED_PIXELS = 2**26  # of the resized image, which only large crops of elongated ones reach


def check_crop(image_size: int, channels: int) -> None:
    """Raises UserError for a crop that no source can make."""
    if not 1 <= image_size <= MAX_SIZE:
        raise UserError(f"--image_size={image_size}: must be from 1 to {MAX_SIZE}")
    if channels not in (1, 3):
        raise UserError(f"--channels={channels}: must be 1 (grey) or 3 (RGB)")


def decode_crop(data: bytes, size: int, channels: int) -> np.ndarray:
    """The centre crop of an image file, read by `decode_image`, as (size, size, channels) uint8.

    Raises:
      ImageError: as `decode_image`, or an image too elongated.
    """
    image = decode_image(data, channels)
    shorter, longer = sorted(image.size)
    if longer > MAX_ASPECT_RATIO * shorter or size * round(size * longer / shorter) > MAX_RESIZED_PIXELS:
        raise ImageError(f"{image.width}x{image.height} is too elongated to crop")
    return np.asarray(centre_crop(image, size)).reshape(size, size, channels)  # H, W, C


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre (size, size) of the image scaled to `size` on its shorter side.

    Halved with a box filter while the shorter side is at least twice `size`, then resized bicubically: the crop of
    the ADM and DiT codes (Dhariwal & Nichol 2021; Peebles & Xie 2023), on which their FID numbers rest.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
