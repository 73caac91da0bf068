"""Makes cases of files other than models, in folders, and loads them."""

import json
from pathlib import Path
import shutil
import sys
import traceback
import tracemalloc

import numpy as np

from tests.data_formats import Format, make_formats, refusing
from tests.forged_data import MODULE, Files, edit_json
from tests.fuzz_judge import BLIND, Outcome, damage, judge, start_measuring

# Libraries decode images, arrays and checkpoints; what they allocate once is no more than this, whatever the file.
FIXED_BYTES = 32 << 20
BYTES_PER_BYTE = 1100  # of what zlib shrank most
SIGNED = 0.5  # of the cases, where there is something to sign
EDITED = 0.6  # of the cases of JSON, the rest are bytes
FORGED = 0.5  # of the cases of formats with forgers
ADDRESS_SPACE = 2 << 30  # of the loading process: threads of libraries take much of it


class DataFuzzer:
    """The counterpart of `fuzz_files.Fuzzer` for everything that is no model."""

    address_space = ADDRESS_SPACE

    def __init__(self, seed: int, folder: Path):
        """Loads every sound file twice, so that everything is imported and cached that ever will be."""
        self._seed, self._folder = seed, folder
        self._formats = make_formats()
        self._shares = np.array([fmt.share for fmt in self._formats]) / sum(fmt.share for fmt in self._formats)
        self.digests, self.peaks = {}, {}
        sys.path.insert(0, str(folder))  # where the forger's module lies, as in the current folder of a command
        tracemalloc.start()
        for fmt in self._formats:
            for _ in range(2):
                path = self._write(fmt, fmt.files)
                before = start_measuring()
                self.digests[fmt.kind] = fmt.load(path)
                self.peaks[fmt.kind] = tracemalloc.get_traced_memory()[1] - before

    def close(self) -> None:
        tracemalloc.stop()
        sys.path.remove(str(self._folder))

    def run(self, number: int) -> Outcome:
        """One case."""
        random = np.random.default_rng([self._seed, number, 1])
        fmt = self._formats[random.choice(len(self._formats), p=self._shares)]
        files, mutation = dict(fmt.files), "?"
        try:
            mutation = _mutate(fmt, files, random)
            allowed = "any" if mutation in fmt.forgers else fmt.survivors
            if fmt.sign and random.random() < SIGNED:
                fmt.sign(files)
                allowed, mutation = "any", f"{mutation}, signed"
            path, size = self._write(fmt, files), sum(map(len, files.values()))
            limit = BYTES_PER_BYTE * size + FIXED_BYTES
            result, message = judge(refusing(fmt.load), path, allowed, self.digests[fmt.kind], size, limit)
            sys.modules.pop(MODULE, None)
        except Exception:
            result, message = "FAILED", "the fuzzer itself: " + traceback.format_exc()
        return Outcome(fmt.kind, mutation, result, message)

    def _write(self, fmt: Format, files: Files) -> Path:
        shutil.rmtree(self._folder, ignore_errors=True)
        for name, content in files.items():
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return self._folder / fmt.opened


def _mutate(fmt: Format, files: Files, random: np.random.Generator) -> str:
    """Changes the files; returns what was done."""
    victim = fmt.victims[random.integers(len(fmt.victims))]
    if fmt.forgers and random.random() < FORGED:
        name = list(fmt.forgers)[random.integers(len(fmt.forgers))]
        fmt.forgers[name](files, victim, random)
        return name
    if _is_json(files[victim]) and random.random() < EDITED:
        edit_json(files, victim, random)
        return "JSON"
    mutation = BLIND[random.integers(len(BLIND))]
    if files[victim]:
        files[victim] = damage(mutation, files[victim], random)
    return mutation


def _is_json(content: bytes) -> bool:
    try:
        return content[:1] in (b"{", b"[") and isinstance(json.loads(content), dict | list)
    except ValueError:
        return False
