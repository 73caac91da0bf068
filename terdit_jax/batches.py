"""Batches of one size, and a few of them in flight, for every loop that keeps devices or threads at work.

What goes into a batch and what is computed of it belongs to the callers.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def fill_up(array: np.ndarray, size: int, value: float = 0) -> np.ndarray:
    """The array (n, ...) with rows of `value` after its own, (size, ...): all batches share one compiled program."""
    if len(array) == size:
        return array
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=value)


def in_flight(items: Iterable[T], count: int = 1) -> Iterator[T]:
    """Yields the items in order, each when `count` more are made: asynchronous work on those runs while it is used."""
    made: deque[T] = deque()
    for item in items:
        made.append(item)
        if len(made) > count:
            yield made.popleft()
    yield from made
