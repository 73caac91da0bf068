"""Figures of the vendors' data sheets: for the utilisation a run reports, and for estimates of runs to come.

All figures are for a chip, as JAX sees it as one device, and nominal: what is reached is for measurements to say.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. Attributes:

    name: as topologies write it.
    kinds: what `device_kind` begins with.
    peak_bf16, peak_int8: dense FLOP/s or operations/s, without sparsity.
    memory: bytes that a program may use.
    memory_bandwidth: bytes/s between the chip and that memory.
    torus_dims: of the interconnect; 0 where all chips of a node meet in a switch.
    port_bandwidth: bytes/s one way, of each of the two ports a torus dimension has, or of a chip's way to the switch.
    node_size: chips that a switch joins; 0 for a torus.
    network_bandwidth: bytes/s one way and chip, between slices or nodes.
    """

    name: str
    kinds: tuple[str, ...]
    peak_bf16: float
    peak_int8: float
    memory: int
    memory_bandwidth: float
    torus_dims: int
    port_bandwidth: float
    node_size: int
    network_bandwidth: float


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p-training,v6e}. Interconnect figures there are both ways and of all
# ports together: 1200 GB/s of v5p are six ports of 100 GB/s each way. Those of the network are for a pod or a host, by
# its chips. Memory is what the compiler (libtpu 0.0.42) lets a program have, a little less than the data sheet's.
# GPUs: NVIDIA's data sheets of A100 80GB, H100 SXM and H200 SXM (NVLink 600 and 900 GB/s both ways; sparse figures
# halved); the network is that of a DGX, one adapter of 200 or 400 Gbit/s a GPU.
CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 275e12, int(30.75 * GIB), 1228e9, 3, 50e9, 0, 6.25e9),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 393e12, int(15.75 * GIB), 819e9, 2, 50e9, 0, 3.125e9),
    Chip("v5p", ("TPU v5",), 459e12, 918e12, int(95.74 * GIB), 2765e9, 3, 100e9, 0, 6.25e9),
    Chip("v6e", ("TPU v6",), 918e12, 1836e12, int(31.25 * GIB), 1638e9, 2, 100e9, 0, 12.5e9),
    Chip("a100", ("NVIDIA A100",), 312e12, 624e12, 80 * GIB, 2039e9, 0, 300e9, 8, 25e9),
    Chip("h100", ("NVIDIA H100",), 989e12, 1979e12, 80 * GIB, 3350e9, 0, 450e9, 8, 50e9),
    Chip("h200", ("NVIDIA H200",), 989e12, 1979e12, 141 * GIB, 4800e9, 0, 450e9, 8, 50e9),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, or None where it is not known (CPUs among them)."""
    # "TPU v5" alone is a v5p, but also what the names of the lite one begin with: they stand before it.
    return next((chip for chip in CHIPS if device_kind.startswith(chip.kinds)), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device, or None where it is not known."""
    chip = find_chip(device_kind)
    return chip.peak_bf16 if chip else None


def wraps(chip: Chip, size: int) -> bool:
    """Whether a torus dimension of a slice, `size` chips long, closes into a ring.

    Cubes of 4 x 4 x 4 are joined by switches, so multiples of four close; v5e and v6e close at the pod's full 16.
    """
    return size % 4 == 0 if chip.torus_dims == 3 else size % 16 == 0


def torus_bandwidth(chip: Chip, extents: list[tuple[int, int, int]]) -> float:
    """Bytes/s that a chip can send in a ring collective over a box of a torus, all dimensions at once.

    Args:
      chip: one with a torus.
      extents: of each dimension that the box extends along, (its chips, their stride, the slice's size).
    """
    # A closed ring uses both ports; chips that lie `stride` apart share their links with the boxes between them.
    return sum(
        chip.port_bandwidth * (2 if count * stride == size and wraps(chip, size) else 1) / stride
        for count, stride, size in extents
    )


def switch_bandwidth(chip: Chip, members: int, nodes: int) -> float:
    """Bytes/s that a chip can send in a ring collective over `members` chips in each of `nodes` nodes."""
    return chip.port_bandwidth if nodes == 1 else min(chip.port_bandwidth, members * chip.network_bandwidth)
