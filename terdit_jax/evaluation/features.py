"""Features of a set of images by a network on all devices, and the moments of them on the host.

With several processes each takes a part, and all get the whole. The network belongs to `inception`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from terdit_jax.batches import fill_up, in_flight
from terdit_jax.choices import FEATURE_BATCH_SIZE
from terdit_jax.errors import UserError
from terdit_jax.evaluation.image_source import ImageSource
from terdit_jax.evaluation.statistics import CHUNK, Moments
from terdit_jax.parallel.mesh import AXES
from terdit_jax.progress import Progress


class FeatureNetwork(NamedTuple):
    """A network that looks at images, and where its weights come from."""

    params: dict
    extract: Callable[[dict, Array], dict[str, Array]]  # images (B, H, W, 3) uint8 -> "pool" (B, D) and others
    source: str  # the file of its weights
    sha256: str  # of that file


class ImageFeatures(NamedTuple):
    """The features of N images, as far as they are kept."""

    pool: np.ndarray  # (N, D) float32, in order
    moments: dict[str, Moments]  # by feature, "pool" included


def collect_features(
    network: FeatureNetwork,
    source: ImageSource,
    mesh: Mesh,
    batch_size: int = FEATURE_BATCH_SIZE,
    say: Callable[[str], None] = lambda line: None,
) -> ImageFeatures:
    """The features of all images; every process returns those of all processes.

    Host memory holds the pool features (410 MB for 50,000 of Inception's) and a few thousand rows of the others.

    Args:
      network: whose features.
      source: the images.
      mesh: of this process's devices, as `parallel.mesh.local_mesh` makes it.
      batch_size: images a device at once.
      say: takes lines about progress.

    Raises:
      UserError: fewer images than processes, or features that are not finite.
    """
    index, processes = jax.process_index(), jax.process_count()
    if source.count < processes:
        raise UserError(f"{source.name}: {source.count} images for {processes} processes: use fewer processes")
    first, stop = (source.count * i // processes for i in (index, index + 1))
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    params = jax.device_put(network.params, NamedSharding(mesh, PartitionSpec()))
    extract = jax.jit(network.extract, out_shardings=sharding)
    rows = _Rows(source.name, stop - first, say)
    size = min(batch_size, -(-source.count // mesh.size)) * mesh.size
    dispatched = (
        (extract(params, jax.device_put(fill_up(images, size), sharding)), len(images))
        for images in source.stream(first, stop, size)
    )
    for features, count in in_flight(dispatched):
        rows.add(features, count)
    return _gathered(rows.finish())


class _Rows:
    """Takes portions of features, keeps the pool features, turns all into moments and tells how far it is."""

    def __init__(self, name: str, count: int, say: Callable[[str], None]):
        self._count = count
        self._pool: list[np.ndarray] = []
        self._waiting: dict[str, list[np.ndarray]] = {}
        self._moments: dict[str, Moments] = {}
        self._progress = Progress(count, say, name=f"{name}: features of ", show=jax.process_index() == 0)

    def add(self, features: dict[str, Array], count: int) -> None:
        """The first `count` rows of each."""
        for name, array in features.items():
            rows = np.asarray(array)[:count]
            self._moments.setdefault(name, Moments(rows.shape[1]))
            waiting = self._waiting.setdefault(name, [])
            waiting.append(rows)
            # Merging costs as much as a thousand rows: it is done seldom.
            if sum(map(len, waiting)) >= CHUNK:
                self._take(name)
            if name == "pool":
                self._pool.append(rows)
        done = self._progress.done + count
        self._progress.reached(done, now=done == self._count)

    def finish(self) -> ImageFeatures:
        """The features of everything taken."""
        for name in self._waiting:
            self._take(name)
        return ImageFeatures(np.concatenate(self._pool), self._moments)

    def _take(self, name: str) -> None:
        if self._waiting[name]:
            self._moments[name].add(np.concatenate(self._waiting[name]))
            self._waiting[name] = []


def _gathered(mine: ImageFeatures) -> ImageFeatures:
    """The features of all processes, in their order."""
    if jax.process_count() == 1:
        return mine
    counts = multihost_utils.process_allgather(np.array(len(mine.pool)))
    parts = multihost_utils.process_allgather(fill_up(mine.pool, counts.max()))
    pool = np.concatenate([part[:count] for part, count in zip(parts, counts, strict=True)])
    return ImageFeatures(pool, {name: _merged(moments) for name, moments in mine.moments.items()})


def _merged(mine: Moments) -> Moments:
    """The moments of all processes, sent as bytes, for JAX would round float64 on its way."""
    packed = np.concatenate([[mine.count], mine.mean, mine.scatter.ravel()])
    whole = Moments(len(mine.mean))
    for content in multihost_utils.process_allgather(packed.view(np.uint8)):
        count, mean, scatter = np.split(content.view(np.float64), [1, 1 + len(mine.mean)])
        whole.merge(int(count[0]), mean, scatter.reshape(mine.scatter.shape))
    return whole
