"""Labels are classes: whole numbers that the model or the data set has. All that takes labels checks them here."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.untrusted import printable


def check_labels(labels: Iterable[Any], num_classes: int, *, owner: str = "the model", prefix: str = "") -> np.ndarray:
    """Returns the labels as an integer array (N,), N above 0.

    Args:
      labels: an array, or a sequence of numbers.
      num_classes: labels lie in [0, num_classes).
      owner: whose classes these are, for the message.
      prefix: what the message begins with, such as the file.

    Raises:
      UserError: no labels, another shape, numbers that are not whole (True and 1.0 among them), or one out of range.
    """
    if not hasattr(labels, "dtype"):
        labels = list(labels)
        if kinds := {type(label).__name__ for label in labels if isinstance(label, (bool, np.bool_))}:
            raise UserError(f"{prefix}labels are {kinds.pop()}: {_EXPECTED.format(num_classes - 1)}")
    try:
        array = np.asarray(labels)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{prefix}labels are lists of several lengths: {_EXPECTED.format(num_classes - 1)}") from error
    if array.ndim != 1 or not array.size:
        raise UserError(f"{prefix}labels of shape {array.shape}: give one number an image, and at least one")
    if array.dtype.kind not in "iu":
        kind, first = str(array.dtype)[:60], printable(str(array[0])[:40])
        raise UserError(f"{prefix}labels are {kind}, the first {first}: {_EXPECTED.format(num_classes - 1)}")
    outside = array[(array < 0) | (array >= num_classes)]
    if outside.size:
        raise UserError(f"{prefix}label {outside[0]} is out of range: {owner} has classes 0 to {num_classes - 1}")
    return array


_EXPECTED = "give whole numbers from 0 to {}"
