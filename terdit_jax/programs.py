"""Keeps compiled programs on disk, so that no command compiles what one before it has: where, how many, and when none.

JAX reads, writes and evicts them. A program that comes from there is the machine code that was compiled, so it computes
the same bits.
"""

import hashlib
import os
from pathlib import Path
import platform
import stat
import sys
from typing import Any
import warnings

from filelock import FileLock
import jax

from terdit_jax.errors import in_a_line
from terdit_jax.files import check_folder

OFF = "off"
MAX_BYTES = 2**29  # of programs, for each kind of machine
MAX_PROGRAMS = 1000  # JAX looks at each of them whenever it adds one
_CPU = ("model name", "flags", "Features", "CPU implementer", "CPU part")  # lines of /proc/cpuinfo


def keep_programs(place: str | None, name: str) -> None:
    """Says where this process keeps the programs that it compiles, and finds those that others have compiled.

    In the user's cache folder JAX evicts the least recently used. A folder there that cannot be used costs a line on
    standard error. Several processes of one run keep none unless they are given a place: the first alone would write.

    Args:
      place: a folder or gs:// without a bound, or "off". Empty: JAX_COMPILATION_CACHE_DIR, else that of the user.
      name: of the flag or field that gives the place.

    Raises:
      UserError: a given place that takes no files.
    """
    if place == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    elif place:
        check_folder(place, name)
        jax.config.update("jax_compilation_cache_dir", place)
    elif _set("jax_enable_compilation_cache") and not (
        _set("jax_compilation_cache_dir") or jax.distributed.is_initialized()
    ):
        try:
            folder = default_folder()
            _tidy(folder)
        except (OSError, RuntimeError) as error:  # RuntimeError: no home, or a file system without locks
            line = f"compiled programs are not kept ({in_a_line(error)}): name another folder, or off, with {name}"
            print(line, file=sys.stderr, flush=True)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if _set("jax_compilation_cache_max_size") == -1:
            jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # a folder without a bound
        # A damaged entry is compiled anew, one that finds no room is not kept: no reason for two lines about each.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache|Cache value for key")


def default_folder() -> Path:
    """The folder of this kind of machine in the user's cache folder.

    Programs for CPUs use the instructions, and are cut for the number, of those that compiled them, which JAX does not
    tell apart; a home may be shared by several kinds.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        kind = "\n".join(line for line in first if line.startswith(_CPU))
    except OSError:
        kind = platform.processor()
    digest = hashlib.sha256(f"{platform.machine()} {cpus} {kind}".encode()).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "terdit_jax" / "programs" / digest[:16]


def _set(name: str) -> Any:
    return getattr(jax.config, name)


def _tidy(folder: Path) -> None:
    """Makes the folder; removes what killed writers have left, and all programs but the last used.

    JAX writes a program, then the time of its use; one without would keep it from adding others.

    Raises:
      OSError: it takes no files, or others could put theirs into it: programs are code that this process runs.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others own or may write to {folder}")
    with FileLock(folder / ".lockfile", timeout=10):  # JAX's own
        (trial := folder / ".trial").write_bytes(bytes(2**16))
        trial.unlink()
        whole = {path.name.removesuffix("-cache") for path in folder.glob("*-cache") if path.stat().st_size}
        used = {path.name.removesuffix("-atime"): path.stat().st_mtime_ns for path in folder.glob("*-atime")}
        kept = sorted(whole & used.keys(), key=used.__getitem__)[-MAX_PROGRAMS:]
        for path in (*folder.glob("*-cache"), *folder.glob("*-atime")):
            if path.name[: -len("-cache")] not in kept:
                path.unlink(missing_ok=True)
