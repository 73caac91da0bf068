"""Images on disk: float arrays to bytes, labelled grids as PNG, and the npz that evaluators read.

It takes images in [-1, 1]; decoding latents into them comes before.
"""

from collections.abc import Sequence
import io
import math

from etils import epath
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from terdit_jax.errors import UserError, printable
from terdit_jax.files import refusing, write_bytes

GAP = 2  # pixels between the images of a grid
LINE = 14  # height of a line of text
MIN_SIDE = 64  # small images are enlarged by a whole factor to at least this


def to_uint8(images: np.ndarray) -> np.ndarray:
    """(..., H, W, C) float in [-1, 1] to uint8; what lies outside is clipped, values are rounded.

    Raises:
      UserError: values that are not finite, for which there is no byte.
    """
    bad = ~np.isfinite(images).reshape(-1, math.prod(images.shape[-3:])).all(axis=1)
    if bad.any():
        raise UserError(
            f"{bad.sum()} of {len(bad)} images hold values that are not finite: weights, guidance or the autoencoder "
            "overflow; try a smaller cfg_scale, dtype float32 or another checkpoint"
        )
    return np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)


def in_color(images: np.ndarray) -> np.ndarray:
    """Images (..., C), grey ones repeated in the three channels that evaluators read."""
    return images.repeat(3, axis=-1) if images.shape[-1] == 1 else images


def make_grid(images: np.ndarray, columns: int = 0, titles: Sequence[str] = ()) -> np.ndarray:
    """Lays (N, H, W, C) uint8 images out in rows on white, small ones enlarged without smoothing.

    Args:
      images: C is 1 or 3.
      columns: images a row; 0: a square, or rows of ten where N is a multiple of ten.
      titles: a text above each image, cut to its width, or above each column where all in it have the same; none if
        left out.

    Returns:
      (height, width, 3) uint8.
    """
    count, height, width, channels = images.shape
    columns = columns or (10 if count % 10 == 0 else math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    lines = rows if any(title != titles[i % columns] for i, title in enumerate(titles)) else min(len(titles), 1)
    factor = max(1, math.ceil(MIN_SIDE / height))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    images = np.broadcast_to(images, (*images.shape[:3], 3)) if channels == 1 else images
    cell_height, cell_width = height * factor + GAP, width * factor + GAP
    grid = np.full((lines * LINE + rows * cell_height + GAP, columns * cell_width + GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        row, left = i // columns, GAP + i % columns * cell_width
        top = min(row + 1, lines) * LINE + GAP + row * cell_height
        grid[top : top + cell_height - GAP, left : left + cell_width - GAP] = image
    if titles:
        sheet = Image.fromarray(grid)
        for i, title in enumerate(titles[: lines * columns]):
            row, left = i // columns, GAP + i % columns * cell_width
            write_caption(sheet, (left, row * (LINE + cell_height)), title, cell_width - GAP)
        grid = np.asarray(sheet)
    return grid


def class_columns(count: int, classes: int) -> int:
    """Columns of a grid of `count` images that cycle through `classes` classes, one a class; 0 if that does not fit."""
    return classes if 1 < classes <= min(count, 10) else 0


def write_caption(sheet: Image.Image, place: tuple[int, int], text: str, width: int) -> None:
    """Writes a line of text, LINE high, from this (left, top) on, cut to a width in pixels."""
    font, text = ImageFont.load_default(11), printable(text)[:width]
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    ImageDraw.Draw(sheet).text(place, text, fill="black", font=font)


def encode_png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: epath.PathLike, image: np.ndarray) -> None:
    """Writes (H, W, 3) uint8; raises UserError if it cannot be written."""
    with refusing(path):
        write_bytes(path, encode_png(image))


def save_npz(path: epath.PathLike, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes `arr_0` (N, H, W, 3) uint8, as the ADM evaluator reads it, and `labels` (N,)."""
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=in_color(images), labels=labels)
    with refusing(path):
        write_bytes(path, buffer.getvalue())
