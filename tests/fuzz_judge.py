"""The outcome of a case: damage to a file's bytes, and the verdict on whoever loads it."""

from collections.abc import Callable
import dataclasses
import os
from pathlib import Path
import tempfile
import time
import traceback
import tracemalloc
import warnings

import numpy as np

from terdit_jax.errors import UserError

SENTINEL = os.path.join(tempfile.gettempdir(), f"terdit_jax_code_was_run_{os.getpid()}")  # what a payload creates
SECONDS = 5  # of computing, which tracing the memory makes ten times as long
LINE = 700  # characters; names from a file are cut, but each may be escaped
BLIND = ("one bit", "bits", "bytes", "zeros", "cut off", "longer", "piece gone", "piece twice", "pieces swapped")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a case: `result` is refused, loaded or FAILED."""

    kind: str
    mutation: str
    result: str
    message: str


def damage(kind: str, content: bytes, random: np.random.Generator) -> bytes:
    """Content that is changed without regard to its meaning, and differs."""
    changed = content
    while changed == content:
        data = np.frombuffer(content, np.uint8).copy()
        i, j, k = sorted(int(n) for n in random.integers(0, data.size + 1, 3))
        some = random.integers(0, data.size, int(random.integers(2, 9)))
        match kind:
            case "one bit":
                data[some[0]] ^= 1 << random.integers(8)
            case "bits":
                np.bitwise_xor.at(data, some, np.uint8(1) << random.integers(0, 8, some.size, np.uint8))
            case "bytes":
                data[i : i + some.size] = random.integers(0, 256, data[i : i + some.size].size)
            case "zeros":
                data[i:j] = 0
            case "cut off":
                data = data[:i]
            case "longer":
                data = np.append(data, random.integers(0, 256, int(random.integers(1, 100)), np.uint8))
            case "piece gone":
                data = np.delete(data, slice(i, j))
            case "piece twice":
                data = np.concatenate([data[:j], data[i:]])
            case "pieces swapped":
                data = np.concatenate([data[:i], data[j:k], data[i:j], data[k:]])
        changed = data.tobytes()
    return changed


def start_measuring() -> int:
    """Bytes that Python has allocated, whose peak is counted from here."""
    tracemalloc.reset_peak()
    return tracemalloc.get_traced_memory()[0]


def judge(load: Callable[[Path], str], path: Path, allowed: str, digest: str, size: int, limit: int) -> tuple[str, str]:
    """Loads a case; gives the result, as `Outcome` has it, and a message.

    Args:
      load: returns a digest or raises UserError.
      path: what it is given.
      allowed: what else than a refusal is sound: "refused" nothing, "same" the digest below, "any" everything.
      digest: of the sound file.
      size: of the files, in bytes.
      limit: on the memory that Python allocates.
    """
    before, began = start_measuring(), time.process_time()
    result, message = "loaded", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)  # users do not see those
            warnings.filterwarnings("ignore", module=r"PIL\.")  # nor those
            found = load(path)
        if allowed == "refused" or (allowed == "same" and found != digest):
            result, message = "FAILED", f"it loaded, where only {allowed!r} is sound"
    except UserError as error:
        result, message = "refused", str(error)
        if not message.isprintable() or len(message.replace(str(path), "")) > LINE:
            result = "FAILED"
    except BaseException:
        result, message = "FAILED", traceback.format_exc()
    peak, seconds = tracemalloc.get_traced_memory()[1] - before, time.process_time() - began
    if peak > limit:
        result, message = "FAILED", f"took {peak} bytes of memory for a file of {size}, {limit} allowed: {message}"
    if seconds > SECONDS:
        result, message = "FAILED", f"took {seconds:.1f} s: {message}"
    if os.path.exists(SENTINEL):
        os.unlink(SENTINEL)
        result, message = "FAILED", f"ran code: {message}"
    return result, message
