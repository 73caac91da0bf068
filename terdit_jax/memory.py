"""The host's memory, for refusing what cannot fit before anything is allocated."""

import os
from pathlib import Path

from terdit_jax.errors import UserError


def host_memory() -> int:
    """Bytes of this machine, or of the container that this process is confined to, if that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(file).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def check_host(size: int, what: str, advice: str) -> None:
    """Raises UserError if the host has less than `size` bytes; `what` asks for them, as "--num_samples=5"."""
    if size > host_memory():
        raise UserError(f"{what}: needs {size:,} bytes, and there are {host_memory():,} of host memory; {advice}")
