"""Labels are classes: whole numbers that the model or the data set has. All that takes labels, or the names of classes,
checks them here."""

from collections.abc import Iterable, Sequence
import difflib
import json
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


def find_classes(wanted: Iterable[str], names: Sequence[str], *, prefix: str = "") -> list[int]:
    """Returns the numbers of the classes with these names.

    A class goes by its name and, as ImageNet's "tench, Tinca tinca", by each part of it between commas.

    Args:
      wanted: names.
      names: of all classes, in their order; empty if they are not known.
      prefix: what the message begins with, such as the flag.

    Raises:
      UserError: a name that no class has, or several.
    """
    if not names:
        raise UserError(f"{prefix}the names of the classes are not known: give whole numbers, as 0,1,2")
    classes = []
    for one in wanted:
        found = [number for number, name in enumerate(names) if one in _parts(name)]
        if not found:
            parts = dict.fromkeys(part for name in names for part in _parts(name))
            close = difflib.get_close_matches(one, parts, 3)
            there = f"did you mean {' or '.join(close)}?" if close else f"the first are {', '.join(names[:3])}"
            raise UserError(f"{prefix}no class is called {one[:100]!r}: {there}")
        if found[1:]:
            raise UserError(f"{prefix}{one!r} is what classes {found[0]} and {found[1]} are called: give the number")
        classes += found
    return classes


def _parts(name: str) -> list[str]:
    return [name, *(part.strip() for part in name.split(","))]


def is_class_name(value: object) -> bool:
    """Whether a value is a text that can be encoded: of a class, whose folder may have any other name."""
    return isinstance(value, str) and len(value) <= 1000 and not any("\ud800" <= char <= "\udfff" for char in value)


def can_be_kept(names: Sequence[object]) -> bool:
    """Whether these are names of classes, and together short enough to be written beside weights."""
    return all(map(is_class_name, names)) and len(json.dumps(names)) <= 1 << 19


_EXPECTED = "give whole numbers from 0 to {}"
