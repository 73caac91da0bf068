"""A contact sheet: images with a caption each, to see at once whether data are what they should be."""

from collections.abc import Sequence
import math

import numpy as np
from PIL import Image

from terdit_jax.inference.images import LINE, write_caption

MIN_SIDE = 96  # small images are enlarged by a whole factor to at least this
GAP = 6


def make_contact_sheet(views: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Lays images out in rows, the views of one side by side above its caption.

    Args:
      views: one or more (N, H, W, 1 or 3) uint8 arrays, such as images and their mirrors.
      captions: N texts, cut to the width of the images above them.

    Returns:
      (height, width, 3) uint8.
    """
    count, height, width = views[0].shape[:3]
    factor = max(1, math.ceil(MIN_SIDE / height))
    height, width = height * factor, width * factor
    cell_width, cell_height = len(views) * (width + 1) - 1 + GAP, height + LINE + GAP
    columns = max(1, min(count, round(math.sqrt(count * cell_height / cell_width))))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    for i, caption in enumerate(captions):
        left, top = GAP + i % columns * cell_width, GAP + i // columns * cell_height
        for k, view in enumerate(views):
            image = np.broadcast_to(view[i], (*view.shape[1:3], 3)).repeat(factor, axis=0).repeat(factor, axis=1)
            sheet.paste(Image.fromarray(image), (left + k * (width + 1), top))
        write_caption(sheet, (left, top + height), caption, cell_width - GAP)
    return np.asarray(sheet)
