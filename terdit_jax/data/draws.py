"""The training stream's random draws: which record lies at each place, and which of its two views is shown there.

Both follow from (seed, place) alone, whoever asks; the reader reads what was drawn.
"""

import threading

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio, odd
_ORDER, _MIRROR = np.uint64(0), np.uint64(1)  # the first draw is keyed by its purpose


class ShuffledStream:
    """Every record of a split once an epoch, in epoch after epoch, each in an order of its own.

    Threads may share one. It holds the orders of the two epochs last asked for, 8 bytes a record.
    """

    def __init__(self, seed: int, size: int):
        """A stream of the records 0 to `size` - 1; `seed` as in `draw_order`."""
        self._seed, self._size = seed, size
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def indices(self, position: np.ndarray) -> np.ndarray:
        """The records (B,) int64 at places `position` (B,) int64 of the stream."""
        epoch, place = np.divmod(position, self._size)
        indices = np.empty_like(position)
        for number in np.unique(epoch).tolist():
            rows = epoch == number
            indices[rows] = self._order(number)[place[rows]]
        return indices

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:  # one thread draws, the others wait for it
            order = self._orders.pop(epoch, None)
            if order is None:
                order = draw_order(self._seed, epoch, self._size)
            self._orders[epoch] = order
            while len(self._orders) > 2:
                self._orders.pop(next(iter(self._orders)))
            return order


def draw_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch: each number below `size` once, (size,) int64.

    Records are sorted by a random number each. Its low bits make room for the record's own number, so that no two are
    equal and every sorting algorithm gives the same order.

    Args:
      seed: decides the order; 0 <= seed < 2**64.
      epoch: another one has another order.
      size: the number of records, below 2**32.
    """
    bits = np.uint64(size.bit_length())
    record = np.arange(size, dtype=np.uint64)
    start = splitmix64(splitmix64(_ORDER, np.uint64(seed)), np.uint64(epoch))
    keys = splitmix64(start, record) >> bits << bits | record
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def draw_mirrored(seed: int, position: np.ndarray) -> np.ndarray:
    """Whether each place in the stream shows the mirrored image: half of them do, (B,) bool.

    A record is drawn anew in each epoch, since it lies at another place there.

    Args:
      seed: decides the draws; 0 <= seed < 2**64.
      position: (B,) int64 places, not negative.
    """
    draws = splitmix64(splitmix64(_MIRROR, np.uint64(seed)), position.astype(np.uint64))
    return (draws >> np.uint64(63)).astype(bool)


def splitmix64(start: np.ndarray | np.uint64, counter: np.ndarray | np.uint64) -> np.ndarray:
    """Outputs number `counter`, from 0 on, of the SplitMix64 generator that starts at `start`: uint64, any shapes.

    It is a hash of start + (counter + 1) * golden, so every output can be had on its own: Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators" (OOPSLA 2014), with the constants of Vigna's splitmix64.c.
    """
    start, counter = np.atleast_1d(start), np.atleast_1d(counter)  # NumPy's scalars warn when they wrap around
    z = start + (counter + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
