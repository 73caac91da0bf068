"""Sample grids as data URIs that together stay within what a page may weigh."""

import base64
from collections.abc import Sequence
import io

from etils import epath
from PIL import Image

from terdit_jax.data.image_file import decode_image, read_file

_PAGE_BYTES = 2_400_000  # of all pictures of a page, before base64 adds a third
_MOST = 12  # grids of a run
_SIDES = (1024, 768, 512, 384, 256, 128)


def choose(pictures: Sequence[tuple[int, epath.Path]]) -> list[tuple[int, epath.Path]]:
    """At most a dozen of a run's grids, evenly spaced, the first and the last among them."""
    if len(pictures) <= _MOST:
        return list(pictures)
    return [pictures[round(i * (len(pictures) - 1) / (_MOST - 1))] for i in range(_MOST)]


def budget(count: int) -> int:
    """The bytes that each of `count` pictures of a page may have."""
    return _PAGE_BYTES // max(1, count)


def data_uri(path: epath.Path, most_bytes: int) -> tuple[str, int, int]:
    """A picture as a data URI, its file as it is or as a smaller WebP; its width and height in pixels.

    Raises:
      ImageError: it is no image.
    """
    content = read_file(path)
    image = decode_image(content, 3)
    width, height = image.size
    kind = "png"
    if len(content) > most_bytes or max(image.size) > _SIDES[0]:
        kind = "webp"
        for side in _SIDES:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            image.save(file := io.BytesIO(), "WEBP", quality=80)
            content = file.getvalue()
            if len(content) <= most_bytes:
                break
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width, height
