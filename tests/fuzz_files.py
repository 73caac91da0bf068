"""Damages and forges files of every kind and loads them: none may crash, hang, run code or take memory without end.

python -m tests.fuzz_files --runs=20000 --seed=0

Every case follows from the seed and its number. One process loads models and another all other files, under limits on
their memory, and what fails is kept with the command that repeats it.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import json
import multiprocessing
import os
from pathlib import Path
import resource
import shutil
import sys
import tempfile
import time
import traceback
import tracemalloc

from absl import logging
import numpy as np

from terdit_jax.interop.exports import export
from terdit_jax.interop.safetensors import as_bytes, open_container
from terdit_jax.interop.weights import open_weights, packed_leaves
from tests import forged_containers
from tests.deployed import random_weights, small_config
from tests.fuzz_data import DataFuzzer
from tests.fuzz_judge import BLIND, Outcome, damage, judge, start_measuring

# Above twice the file, of which NumPy's arrays are made: Python objects for every byte of names and shapes, of which
# at most 2 MiB are read (an empty dict is one byte of a pickle and 72 of memory, a list in JSON three and 64), and what
# importing, tracing and caching take once, whatever the file.
OBJECTS_PER_BYTE = 80
FIXED_BYTES = 4 << 20
PATIENCE = 60  # seconds by the clock, after which the process hangs
ADDRESS_SPACE = 256 << 20  # of the loading process, above what it has after it loaded every sound file
# Most of the time would go to these: shares of the runs that use a large file, and that keep a slow mutation.
_LARGE_SHARE, _SLOW_SHARE = 0.03, 0.1
_SLOW = ("many objects", "quadratic", "shared storage")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sound file. Attributes:

    kind: of file.
    files: name -> content; the first is what is opened.
    victim: the one that is damaged.
    survivors: what may come of damage that no checksum was put right for: "refused" where one covers every byte,
      "same" where one covers every byte that means something, "any" without checksums.
    arrays: the tensors in it.
    fields: the description in it.
    index_bytes: of names and shapes: JSON, or pickle and directory.
    """

    kind: str
    files: dict[str, bytes]
    victim: str
    survivors: str
    arrays: dict[str, np.ndarray]
    fields: dict
    index_bytes: int

    @property
    def mutations(self) -> tuple[str, ...]:
        return BLIND + forged_containers.NAMES


def make_samples(large: bool = True) -> list[Sample]:
    """A model of some kB in four kinds of file; if `large`, two of 8 MB too, beside which objects are little."""
    tiny = small_config(hidden_size=16, num_heads=2, input_size=4, num_classes=3, ffn_multiple_of=16)
    packed = _exported("safetensors, packed", tiny, kind="safetensors")
    masters = _exported("safetensors, masters", tiny, kind="safetensors", masters=True)
    # Streams are shorter than planes only where those have some hundred bytes.
    small = dataclasses.replace(tiny, hidden_size=32, depth=1)
    samples = [_exported("artifact", tiny), _exported("deflated artifact", small, compress=True), packed, masters]
    if large:
        wide = small_config(hidden_size=512, depth=5, num_heads=8, ffn_multiple_of=256)
        samples += [_exported("8 MB artifact", wide), _exported("8 MB deflated artifact", wide, compress=True)]
    return samples


def _exported(name: str, model, kind: str = "packed", **options) -> Sample:
    weights, file = random_weights(model), "model.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        export(weights, path, kind, **options)
        container = open_container(path)
        arrays = {key: np.array(array) for key, array in container.arrays.items()}
        survivors = "refused" if kind == "packed" else "any"
        fields = weights.description.to_dict()
        return Sample(name, {file: path.read_bytes()}, file, survivors, arrays, fields, len(container.header))


class Fuzzer:
    """Makes cases of models and loads them, in this process."""

    address_space = ADDRESS_SPACE

    def __init__(self, seed: int, folder: Path, large: bool = True):
        """Loads every sound file once, so that everything is compiled and cached that ever will be."""
        self._seed, self._folder = seed, folder
        self._samples = make_samples(large)
        self._small = [sample for sample in self._samples if not sample.kind.startswith("8 MB")]
        self.digests, self.peaks = {}, {}
        tracemalloc.start()
        for sample in self._samples:
            for _ in range(2):
                path = self._write(sample, sample.files[sample.victim])
                before = start_measuring()
                self.digests[sample.kind] = load(path)
                self.peaks[sample.kind] = tracemalloc.get_traced_memory()[1] - before

    def close(self) -> None:
        tracemalloc.stop()

    def run(self, number: int) -> Outcome:
        """One case."""
        random = np.random.default_rng([self._seed, number])
        larger = self._samples[len(self._small) :]
        samples = larger if larger and random.random() < _LARGE_SHARE else self._small
        sample = samples[random.integers(len(samples))]
        mutation = sample.mutations[random.integers(len(sample.mutations))]
        while mutation in _SLOW and random.random() > _SLOW_SHARE:
            mutation = sample.mutations[random.integers(len(sample.mutations))]
        try:
            content, allowed = self._mutate(sample, mutation, random)
            result, message = self._judge(sample, content, allowed)
        except Exception:
            result, message = "FAILED", "the fuzzer itself: " + traceback.format_exc()
        return Outcome(sample.kind, mutation, result, message)

    def _mutate(self, sample: Sample, mutation: str, random: np.random.Generator) -> tuple[bytes, str]:
        content = sample.files[sample.victim]
        if mutation in BLIND:
            return damage(mutation, content, random), sample.survivors
        return forged_containers.forge(mutation, content, random)

    def _judge(self, sample: Sample, content: bytes, allowed: str) -> tuple[str, str]:
        path = self._write(sample, content)
        size = sum(file.stat().st_size for file in self._folder.iterdir())
        index_bytes = sample.index_bytes + max(0, len(content) - len(sample.files[sample.victim]))
        limit = 2 * size + OBJECTS_PER_BYTE * min(index_bytes, 2 << 20) + FIXED_BYTES
        return judge(load, path, allowed, self.digests[sample.kind], size, limit)

    def _write(self, sample: Sample, content: bytes) -> Path:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for name, sound in sample.files.items():
            (self._folder / name).write_bytes(content if name == sample.victim else sound)
        return self._folder / next(iter(sample.files))


KINDS = {"models": Fuzzer, "data": DataFuzzer}


def load(path: Path) -> str:
    """Loads a model as far as host memory, leaf by leaf, and digests all of it."""
    weights = open_weights(path)
    digest = hashlib.sha256(json.dumps(weights.description.to_dict(), sort_keys=True).encode())
    for name, leaf in packed_leaves(weights.model, weights.leaves()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(as_bytes(leaf))
    return digest.hexdigest()


def _serve(connection, kinds: str, seed: int, folder: Path) -> None:
    """The loading process: answers numbers with outcomes."""
    logging.set_verbosity(logging.FATAL)  # what is said of damage loudly would be said thousands of times
    fuzzer = KINDS[kinds](seed, folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + fuzzer.address_space, used + fuzzer.address_space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send(fuzzer.peaks)
    while (number := connection.recv()) is not None:
        connection.send(fuzzer.run(number))


class Loader:
    """A process that loads cases; a case that ends it, or that does not end, becomes an outcome as others are."""

    def __init__(self, kinds: str, seed: int, folder: Path):
        context = multiprocessing.get_context("spawn")
        self._connection, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, kinds, seed, folder), daemon=True)
        self._process.start()
        far.close()
        self.peaks = self._connection.recv()

    def run(self, number: int) -> Outcome | None:
        """The outcome of a case, or None if the process is no more."""
        try:
            self._connection.send(number)
            if self._connection.poll(PATIENCE):
                return self._connection.recv()
        except (EOFError, OSError):
            pass
        self._process.kill()
        self._process.join()
        return None

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases and prints what came of them; the exit status is 1 if any failed."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["MALLOC_ARENA_MAX"] = "2"  # a thread's own arena takes address space by the 64 MiB
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures"), help="where files that fail are put")
    parser.add_argument("--kinds", choices=["all", *KINDS], default="all", help="all: half of the runs of each")
    options = parser.parse_args(argv)
    began, kinds = time.monotonic(), list(KINDS) if options.kinds == "all" else [options.kinds]
    runs = -(-options.runs // len(kinds))
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor() as pool:
        every = list(pool.map(lambda kind: _run(kind, runs, options, Path(temporary) / kind), kinds))
    outcomes, peaks = [outcome for found, _ in every for outcome in found], [peaks for _, peaks in every]
    failures = sum(outcome.result == "FAILED" for outcome in outcomes)
    print(table(outcomes))
    for of_kind in peaks:
        print("memory of sound files, MB: " + ", ".join(f"{kind} {peak / 1e6:.2f}" for kind, peak in of_kind.items()))
    print(f"{len(outcomes)} cases in {time.monotonic() - began:.0f} s, {failures} failed")
    return 1 if failures else 0


def _run(kinds: str, runs: int, options: argparse.Namespace, folder: Path) -> tuple[list[Outcome], dict[str, int]]:
    """The outcomes of `runs` cases, loaded by a process of their own, and the memory that sound files take."""
    loader, outcomes = Loader(kinds, options.seed, folder / "case"), []
    case = folder / "case"
    for number in range(options.first, options.first + runs):
        outcome = loader.run(number)
        died = outcome is None
        if died:
            outcome = Outcome("?", "?", "FAILED", "the process crashed or hung")
        outcomes.append(outcome)
        if outcome.result == "FAILED":
            shutil.copytree(case, options.keep / kinds / str(number), dirs_exist_ok=True)
            repeat = f"--kinds={kinds} --seed={options.seed} --first={number} --runs=1"
            print(f"FAILED {outcome.kind}, {outcome.mutation}: {outcome.message}")
            print(f"  python -m tests.fuzz_files {repeat}", flush=True)
        if died:
            case = folder / f"case {number}"
            loader = Loader(kinds, options.seed, case)
    loader.close()
    return outcomes, loader.peaks


def table(outcomes: list[Outcome]) -> str:
    """A line for every kind of file and mutation, with the sum at the end."""
    counts: dict[tuple[str, str], Counter] = {}
    for outcome in outcomes:
        for key in ((outcome.kind, outcome.mutation), ("all", "")):
            counts.setdefault(key, Counter())[outcome.result] += 1
    lines = [f"{'file':<24}{'mutation':<20}{'tried':>8}{'refused':>9}{'loaded':>8}{'FAILED':>8}"]
    for (kind, mutation), count in sorted(counts.items(), key=lambda item: (item[0][0] == "all", item[0])):
        results = f"{count['refused']:>9}{count['loaded']:>8}{count['FAILED']:>8}"
        lines.append(f"{kind:<24}{mutation:<20}{count.total():>8}{results}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
