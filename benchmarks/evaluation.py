"""The ADM suite at its full size: pictures through Inception a second, each metric's time, and memory.

python -m benchmarks.evaluation --output=evaluation.json
python -m benchmarks.evaluation --quick --output=evaluation.json     # a few small pictures: does it run?

Random pictures and random weights: neither changes the work. Features of the second set, the reference's, are drawn at
random from the first one's distribution. Peak memory of the device is what the allocator says, above the weights; of
the host, the process's largest resident size so far above what it had once the network had seen its first pictures.
"""

from collections.abc import Callable, Iterator, Sequence
import datetime
import json
import pathlib
import platform
import resource
import sys
import time
from typing import Any, NamedTuple

from absl import flags
import jax
from jax.sharding import Mesh
import numpy as np

from terdit_jax.errors import run_command
from terdit_jax.evaluation import inception
from terdit_jax.evaluation.features import FeatureNetwork, ImageFeatures, collect_features
from terdit_jax.evaluation.image_source import ImageSource
from terdit_jax.evaluation.manifold import precision_recall
from terdit_jax.evaluation.statistics import Moments
from terdit_jax.evaluation.suite import Reference, feature_statistics, inception_extract, suite_metrics
from terdit_jax.parallel.mesh import local_mesh
from terdit_jax.paths import define_path
from terdit_jax.versions import versions

_QUICK = flags.DEFINE_bool("quick", False, "Few and small pictures.")
_NUM_PICTURES = flags.DEFINE_integer("num_pictures", 50_000, "Pictures.", lower_bound=16)
_SIDE = flags.DEFINE_integer("side", 256, "Height and width of a picture.", lower_bound=8)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", "32,64,128", "Of a device; the fastest takes all pictures.")
_OUTPUT = define_path("output", "evaluation.json", "JSON file.")

_DISTINCT = 256  # pictures, drawn once and shown again and again
_TRIAL = 4096  # pictures that tell the fastest batch size


class Size(NamedTuple):
    """How much is measured."""

    pictures: int
    side: int
    batch_sizes: tuple[int, ...]
    trial: int


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    batch_sizes = tuple(int(size) for size in _BATCH_SIZES.value)
    size = Size(16, 32, (2,), 4) if _QUICK.value else Size(_NUM_PICTURES.value, _SIDE.value, batch_sizes, _TRIAL)
    network = FeatureNetwork(random_params(), inception_extract, "random", "")
    rows = measure(network, size, local_mesh())
    content = {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "device": jax.devices()[0].device_kind, "devices": jax.local_device_count(), "cpu": platform.machine()
        },
        "python": sys.version.split()[0], "versions": versions("jax", "jaxlib", "numpy"), "quick": _QUICK.value,
        "rows": rows,
    }  # fmt: skip
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


def measure(network: FeatureNetwork, size: Size, mesh: Mesh) -> list[dict[str, Any]]:
    """Rows of what was measured: the trial of each batch size, all pictures, then each metric."""
    source, rows = random_pictures(size.pictures, size.side), []
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(network.params))
    resident, rates = 0, {}
    for batch_size in size.batch_sizes:
        trial = random_pictures(min(size.trial, size.pictures), size.side)
        first = random_pictures(batch_size * mesh.size, size.side)
        compiling, _ = timed(lambda n=batch_size, s=first: collect_features(network, s, mesh, n))
        resident = resident or _resident_bytes()
        seconds, _ = timed(lambda n=batch_size, s=trial: collect_features(network, s, mesh, n))
        rates[batch_size] = trial.count / seconds
        rows.append(
            {"what": "trial", "batch_size": batch_size, "pictures": trial.count,
             "pictures_per_second": rates[batch_size], "first_batch_seconds": compiling}
        )  # fmt: skip
    best = max(rates, key=rates.get)
    seconds, features = timed(lambda: collect_features(network, source, mesh, best))
    rows.append(
        {"what": "features", "batch_size": best, "pictures": size.pictures, "seconds": seconds,
         "pictures_per_second": size.pictures / seconds} | _memory(weights, resident)
    )  # fmt: skip

    reference = Reference("random", feature_statistics(_alike(features, seed=1)), None)
    seconds, metrics = timed(lambda: suite_metrics(network, features, reference))
    rows.append({"what": ", ".join(metrics), "seconds": seconds} | _memory(weights, resident))
    pool = _alike(features, seed=2).pool
    seconds, found = timed(lambda: precision_recall(pool, features.pool))
    rows.append({"what": "precision, recall", "seconds": seconds, **found._asdict()} | _memory(weights, resident))
    return rows


def random_pictures(count: int, side: int) -> ImageSource:
    """A source that costs next to nothing to read."""
    distinct = np.random.default_rng(0).integers(0, 256, (min(count, _DISTINCT), side, side, 3), np.uint8)

    def stream(first: int, stop: int, size: int) -> Iterator[np.ndarray]:
        for start in range(first, stop, size):
            yield distinct[np.arange(start, min(start + size, stop)) % len(distinct)]

    return ImageSource("random", count, (side, side, 3), stream)


def random_params() -> dict:
    """The network's, of a size that keeps activations as they are."""
    rng, params = np.random.default_rng(0), {}
    for name, (out, before, height, width) in inception.kernels().items():
        branch = params
        for part in name.split("."):
            branch = branch.setdefault(part, {})
        scale = np.float32(np.sqrt(2 / (before * height * width)))
        branch["weight"] = rng.standard_normal((out, height, width, before), np.float32) * scale
        branch["bias"] = np.zeros(out, np.float32)
    fc = rng.standard_normal((inception.CLASSES, inception.POOL_FEATURES), np.float32) * np.float32(0.02)
    return params | {"fc": {"weight": fc}}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it returns, which is on the host."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def _alike(features: ImageFeatures, seed: int) -> ImageFeatures:
    """Features of the same number of other pictures: each column's values permuted, with a little noise."""
    rng, moments = np.random.default_rng(seed), {}
    pool = features.pool[rng.permutation(len(features.pool))]
    pool = pool + rng.standard_normal(pool.shape, np.float32) * (0.1 * pool.std(axis=0) + np.float32(1e-3))
    for name, ours in features.moments.items():
        moments[name] = Moments(len(ours.mean))
        if name == "pool":
            moments[name].add(pool)
        else:
            moments[name].merge(ours.count, ours.mean + 0.1, ours.scatter)
    return ImageFeatures(pool, moments)


def _memory(weights: int, resident: int) -> dict[str, float]:
    stats = jax.local_devices()[0].memory_stats() or {}
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    host = {"host_peak_gb_above_start": (largest - resident) / 1e9}
    if "peak_bytes_in_use" not in stats:
        return host
    return host | {"device_peak_gb_above_weights": (stats["peak_bytes_in_use"] - weights) / 1e9}


def _resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    run_command(main)
