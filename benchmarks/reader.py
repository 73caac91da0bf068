"""Records a second out of ArrayRecord shards: read, decoded, and as training batches, compressed and not.

python -m benchmarks.reader --output=reader.json

The data set is random latents with their mirrors, written for the occasion. Everything has been read once before it is
timed, so the operating system may hold the shards in memory; each figure is the best of a few runs of some seconds.
Processor time, of all threads together, says what is left of a core for others, and depends less on who else is busy.
"""

from collections.abc import Callable, Iterator, Sequence
import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import tempfile
import time

from absl import flags
from array_record.python.array_record_module import ArrayRecordReader
import numpy as np

from benchmarks.random_latents import WRITER_OPTIONS, write_dataset
from terdit_jax.data import reader, schema
from terdit_jax.errors import run_command
from terdit_jax.paths import define_path

_RECORDS = flags.DEFINE_integer("records", 20_480, "Records of the training split.", lower_bound=1)
_SHARDS = flags.DEFINE_integer("shards", 8, "Files that hold them.", lower_bound=1)
_SHAPE = flags.DEFINE_list("shape", ["32", "32", "4"], "H, W, C of a record's arrays.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Records read together.", lower_bound=1)
_PIPELINES = flags.DEFINE_list("pipelines", ["1:1", "2:4", "16:4", "16:16"], "READ_THREADS:PREFETCH of each pipeline.")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "Length of one run.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Runs, of which the best counts.", lower_bound=1)
_CORES = flags.DEFINE_integer("cores", 2, "Processor cores to use, where the system can set them.", lower_bound=1)
_SCRATCH = define_path("scratch", None, "Where the data sets lie meanwhile; the system's own if none.")
_OUTPUT = define_path("output", "reader.json", "JSON file.")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _CORES.value])
    rows = []
    with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as scratch:
        for compression, options in WRITER_OPTIONS.items():
            path = pathlib.Path(scratch) / compression
            write_dataset(path, tuple(map(int, _SHAPE.value)), _RECORDS.value, _SHARDS.value, options)
            rows += measure(path, compression)
    versions = {name: importlib.metadata.version(name) for name in ("grain", "array_record", "protobuf", "numpy")}
    content = {
        "date": datetime.date.today().isoformat(),
        "versions": versions | {"python": platform.python_version()},
        "cores": _CORES.value,
        "records": _RECORDS.value,
        "shards": _SHARDS.value,
        "batch_size": _BATCH_SIZE.value,
        "rows": rows,
    }
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")
    print(f"{'shards':<14}{'what is read':<36}{'bytes a record':>16}{'records/s':>12}{'MB/s':>8}{'CPU us':>8}")
    for row in rows:
        print(
            f"{row['compression']:<14}{row['what']:<36}{row['record_bytes']:>16,.0f}{row['records_per_second']:>12,.0f}"
            f"{row['records_per_second'] * row['record_bytes'] / 1e6:>8,.0f}{row['cpu_us_per_record']:>8,.1f}"
        )


def measure(path: pathlib.Path, compression: str) -> list[dict]:
    """Records a second of every way to read the data set."""
    dataset = reader.open_dataset(path)
    train = dataset.metadata.splits["train"]
    size = _BATCH_SIZE.value
    ways: dict[str, Callable[[], Iterator]] = {
        "raw, a shard's records in one call": lambda: _raw_reads(path, train),
        "one thread, decoded": lambda: _decoded_reads(dataset),
    }
    for threads, prefetch in (pipeline.split(":") for pipeline in _PIPELINES.value):
        ways[f"batches, {threads} threads, prefetch {prefetch}"] = lambda t=int(threads), p=int(prefetch): _batches(
            dataset, t, p
        )
    ways["batches, in memory, 16 threads"] = lambda: _batches(dataset, 16, 4, in_memory=True)
    rows = []
    for what, way in ways.items():
        rates, cpu_seconds = zip(*(_time(way()) for _ in range(_REPEATS.value)), strict=True)
        row = {
            "compression": compression,
            "what": what,
            "record_bytes": sum(shard.bytes for shard in train.shards) / train.records,
            "records_per_second": max(rates) * size,
            "cpu_us_per_record": min(cpu_seconds) / size * 1e6,
        }
        rows.append(row)
    return rows


def _time(batches: Iterator) -> tuple[float, float]:
    """Batches a second, and seconds of processor time a batch, once as many as the data set holds have been seen."""
    for _ in itertools.islice(batches, max(1, _RECORDS.value // _BATCH_SIZE.value)):
        pass
    begin, cpu_begin, count = time.perf_counter(), time.process_time(), 0
    while (elapsed := time.perf_counter() - begin) < _SECONDS.value:
        next(batches)
        count += 1
    return count / elapsed, (time.process_time() - cpu_begin) / count


def _raw_reads(path: pathlib.Path, split: schema.Split) -> Iterator[list[bytes]]:
    """Serialized records at random, as many as a batch has, all of one shard after the other."""
    readers = [
        ArrayRecordReader(os.fspath(path / shard.file), "readahead_buffer_size:0,max_parallelism:0")
        for shard in split.shards
    ]
    generator = np.random.default_rng(0)
    for index in itertools.cycle(range(len(readers))):
        yield readers[index].read(generator.integers(split.shards[index].records, size=_BATCH_SIZE.value).tolist())


def _decoded_reads(dataset: reader.Dataset) -> Iterator[reader.Batch]:
    records, generator = dataset.records("train"), np.random.default_rng(0)
    while True:
        yield records.read(generator.integers(len(records), size=_BATCH_SIZE.value))


def _batches(dataset: reader.Dataset, threads: int, prefetch: int, in_memory: bool = False) -> Iterator[reader.Batch]:
    return reader.make_batches(
        dataset,
        seed=0,
        batch_size=_BATCH_SIZE.value,
        start_step=0,
        process_index=0,
        process_count=1,
        horizontal_flip=True,
        in_memory=in_memory,
        read_threads=threads,
        prefetch=prefetch,
    )


if __name__ == "__main__":
    run_command(main)
