"""Machines by name, `v5p:8x8x4` or `h200:64`, and their devices, which a program can be compiled for without them.

What chips can do lives in `parallel.chips`, how a mesh is laid over devices in `parallel.mesh`.
"""

import dataclasses
import itertools
import math
import os
import re
from typing import Any

import jax

from terdit_jax.choices import TOPOLOGIES
from terdit_jax.errors import UserError
from terdit_jax.parallel.chips import CHIPS, Chip, switch_bandwidth, torus_bandwidth

# What the compiler must know of an H200: CUDA's device properties as XLA reads them. Versions are text there.
_H200_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 device_memory_size: 151397597184
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0" runtime_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""

# libtpu would ask the network which TPU it runs on, say at length that there is none, and let one process at a time in.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_CPU = Chip("cpu", (), math.inf, math.inf, 2**63, math.inf, 0, math.inf, 0, math.inf)  # of unknown rates, for tests
_MOST_CHIPS = 2**17
_MOST_CPUS = 1024  # each is some threads of this machine


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine. Attributes:

    name: as it was given.
    chip: every device of it.
    grid: its shape: of the torus, or (nodes, chips a node) for GPUs, or (devices,) for CPUs.
    """

    name: str
    chip: Chip
    grid: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.grid)

    @property
    def is_cpu(self) -> bool:
        return self.chip is _CPU

    @property
    def is_gpu(self) -> bool:
        return self.chip.node_size > 0

    def place(self, chip: int, device: jax.Device) -> tuple[int, ...]:
        """The place of a device in the grid; `chip` is its number in the order of `devices`."""
        if self.chip.torus_dims:
            return tuple(device.coords[: len(self.grid)])
        return tuple(int(i) for i in divmod(chip, self.grid[-1]))[-len(self.grid) :]

    def bandwidth(self, places: list[tuple[int, ...]]) -> float:
        """Bytes/s that a chip can send in a ring collective over the chips at these places; inf for CPUs."""
        by_dim = [sorted(set(along)) for along in zip(*places, strict=True)]
        if not self.chip.torus_dims:
            nodes = len(by_dim[0])
            return switch_bandwidth(self.chip, max(1, len(places) // nodes), nodes)
        return torus_bandwidth(
            self.chip,
            [
                (len(along), min(b - a for a, b in itertools.pairwise(along)), size)
                for along, size in zip(by_dim, self.grid, strict=True)
                if len(along) > 1
            ],
        )


def parse_topology(name: str) -> Topology:
    """A machine from its name.

    Raises:
      UserError: a family or shape that is unknown.
    """
    match = re.fullmatch(r"(\w+):([0-9]{1,6}(?:x[0-9]{1,6})*)", name)
    if match is None:
        raise UserError(f"--topology={name}: give a chip and a shape, as {TOPOLOGIES}")
    family, shape = match[1], tuple(int(size) for size in match[2].split("x"))
    chips = {chip.name: chip for chip in CHIPS if chip.torus_dims or chip.name == "h200"}
    chip = _CPU if family == "cpu" else chips.get(family)
    if chip is None:
        raise UserError(f"--topology={name}: no chip {family!r} is known: give one of {', '.join(chips)}")
    dims = chip.torus_dims or 1
    if len(shape) != dims or not all(shape):
        raise UserError(f"--topology={name}: {family} takes {dims} positive size{'s' * (dims > 1)}, as {TOPOLOGIES}")
    if math.prod(shape) > (most := _MOST_CPUS if chip is _CPU else _MOST_CHIPS):
        raise UserError(f"--topology={name}: has {math.prod(shape):,} devices, give at most {most:,}")
    if chip.node_size:
        per_node = min(shape[0], chip.node_size)
        if shape[0] % per_node:
            raise UserError(f"--topology={name}: beyond {per_node}, give a multiple of {per_node} (whole nodes)")
        shape = (shape[0] // per_node, per_node)
    return Topology(name, chip, shape)


def open_devices(topology: Topology) -> list[jax.Device]:
    """The machine's devices, for compiling only.

    Raises:
      UserError: the compiler for it is not installed, or knows no such shape.
    """
    if topology.is_cpu:
        if jax.device_count() < topology.num_chips:
            raise UserError(f"--topology={topology.name}: JAX has {jax.device_count()} CPU devices here")
        return jax.devices()[: topology.num_chips]
    from jax.experimental import topologies

    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    try:
        if topology.is_gpu:
            nodes, per_node = topology.grid
            return list(
                topologies.get_topology_desc(
                    platform="cuda", target_config=_H200_TARGET, topology=f"1x{nodes}x{per_node}"
                ).devices
            )
        options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
        if topology.num_chips == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices)
    except Exception as error:  # both plugins raise what they like, RuntimeErrors mostly
        reason = " ".join(str(error).split())
        if _is_missing(reason):
            raise UserError(
                f"--topology={topology.name}: its compiler is not installed: pip install 'terdit-jax[aot]' ({reason})"
            ) from error
        raise UserError(f"--topology={topology.name}: the compiler knows no such machine: {reason}") from error


def _is_missing(reason: str) -> bool:
    return "not installed" in reason or "not implemented for cuda" in reason
