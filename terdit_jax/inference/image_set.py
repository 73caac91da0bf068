"""Drawing a set of any size: its labels, the plan that fixes it, and the shards that every process draws of it.

Processes talk through the shards on disk alone, each drawing its own with the devices it has; `shards` owns the files.
"""

from collections.abc import Callable, Mapping, Sequence
import hashlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from terdit_jax.choices import LABEL_ORDERS
from terdit_jax.errors import UserError
from terdit_jax.inference.images import to_uint8
from terdit_jax.inference.shards import Shards
from terdit_jax.labels import check_labels
from terdit_jax.progress import Progress
from terdit_jax.reproducible import make_key

SHARD_SIZE = 1024  # images, of which a kill costs one shard a process
_MAX_CLASSES = 2**31  # labels are int32 on devices
_LABELS = 0x1ABE1  # keeps their draws apart from the noise, whose keys are folded with the number of a step

# Called with labels (S,), the index of the first image and a report of how many are done: (S, H, W, C) in [-1, 1].
DrawShard = Callable[[np.ndarray, int, Callable[[int], None]], np.ndarray]


def make_labels(classes: Sequence[int], num_samples: int, order: str, seed: int) -> np.ndarray:
    """(num_samples,) int labels.

    Args:
      classes: to choose from.
      num_samples: images.
      order: "balanced", the classes in turn, or "random", each label drawn by (seed, its index) alone.
      seed: of random labels.

    Raises:
      UserError: another order, no classes, or classes that are no whole numbers from 0 on.
    """
    among = check_labels(classes, _MAX_CLASSES).astype(np.int64)
    if order not in LABEL_ORDERS:
        raise UserError(f"{order!r} is no order of labels: give one of {', '.join(LABEL_ORDERS)}")
    if order == "balanced":
        return np.resize(among, num_samples)
    key = jax.random.fold_in(make_key(seed), _LABELS)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_samples, dtype=jnp.int32))
    chosen = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(among), jnp.int32))(keys)
    return among[np.asarray(chosen)]


def digest(tree: Any) -> str:
    """Hashes all leaves' bytes, dtypes and shapes in order, which tells two sets of weights apart."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf)
        sha.update(f"{array.dtype}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).view(np.uint8).data)
    return sha.hexdigest()


def draw_set(shards: Shards, labels: np.ndarray, draw: DrawShard, say: Callable[[str], None]) -> None:
    """Draws the shards that are missing and puts the output together. Called by every process of a run.

    Args:
      shards: of one plan, in a folder that all processes see.
      labels: (N,) of all images.
      draw: draws the images of a shard; the same ones whenever it is called with the same arguments.
      say: prints a line of progress; called in the first process alone.
    """
    index, count = jax.process_index(), jax.process_count()
    mine = [number for number in range(index, len(shards.sizes), count) if shards.read(number) is None]
    _meet("image set opened")  # none may finish and clear away what another has not looked at yet
    progress = Progress(len(labels), say, start=_count(shards)) if index == 0 else None
    for number in mine:
        _draw_shard(shards, number, labels, draw, progress)
    while index and not shards.is_complete():
        time.sleep(1)
    if index == 0:
        while count > 1 and not all(map(shards.is_written, range(len(shards.sizes)))):  # those of other processes
            time.sleep(1)
        while damaged := shards.finish():
            for number in damaged:
                _draw_shard(shards, number, labels, draw, progress)


def _draw_shard(shards: Shards, number: int, labels: np.ndarray, draw: DrawShard, progress: Progress | None) -> None:
    first, written = sum(shards.sizes[:number]), progress.done if progress else 0
    of_shard = labels[first : first + shards.sizes[number]]
    images = draw(of_shard, first, lambda done: progress.reached(written + done) if progress else None)
    shards.write(number, to_uint8(images), of_shard)
    if progress:
        progress.reached(_count(shards), now=True)


def _count(shards: Shards) -> int:
    """The images on disk, of all processes."""
    return sum(size for number, size in enumerate(shards.sizes) if shards.is_written(number))


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def make_plan(
    *, model: Mapping[str, Any], settings: Mapping[str, Any], labels: Mapping[str, Any], num_samples: int, seed: int
) -> dict[str, Any]:
    """Collects what decides the images of a set, as JSON can hold it; devices, processes and batch size do not.

    Args:
      model: which weights in which dtype, and the autoencoder that decodes for them.
      settings: the sampler's, as `config.sample`.
      labels: their order and classes.
      num_samples: images.
      seed: of all noise and of random labels.
    """
    settings = {name: value for name, value in settings.items() if name != "num_images"}
    return {
        "model": dict(model), "sample": settings, "labels": dict(labels), "num_samples": num_samples,
        "seed": seed, "shard_size": SHARD_SIZE,
    }  # fmt: skip
