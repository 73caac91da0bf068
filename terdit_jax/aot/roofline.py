"""A lower bound of a program's time: arithmetic, memory traffic and collectives at the peak rates of data sheets."""

from collections.abc import Iterable
import dataclasses

from terdit_jax.aot.collectives import Collective, Groups
from terdit_jax.aot.costs import Costs
from terdit_jax.aot.topology import Topology

ASSUMPTIONS = (
    "matrix products run at the data sheet's dense peak of their dtype; float32 ones as six passes of bfloat16 "
    "(two on GPUs, TF32); other arithmetic is free",
    "every operand and result of an instruction or fusion crosses the chip's memory once at full bandwidth; what the "
    "compiler keeps in a TPU's vector memory does not",
    "collectives are rings over all torus dimensions, or NVLink and network adapters, that their groups extend along, "
    "at full bandwidth one after the other, without latency",
    "'overlapped': the slowest of arithmetic, memory and communication hides the others; 'in turn': nothing hides "
    "anything",
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run of a program on one chip, at best."""

    compute: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        """The time if the slowest part hides the rest."""
        return max(self.compute, self.memory, self.network)

    @property
    def in_turn(self) -> float:
        """The time if nothing hides anything."""
        return self.compute + self.memory + self.network

    @property
    def bound(self) -> str:
        """The slowest part."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def make_roofline(topology: Topology, costs: Costs, collectives: Iterable[Collective], places: list) -> Roofline | None:
    """The roofline of a program, or None for CPUs, whose rates are not known.

    `places` are those of all devices in the machine's grid (`Topology.place`), in the mesh's order.
    """
    if topology.is_cpu:
        return None
    compute = network = 0.0
    for dtype, flops in costs.flops.items():
        compute += flops / _rate(topology, dtype)
    bandwidths: dict[Groups, float] = {}
    for collective in collectives:
        if collective.groups not in bandwidths:
            bandwidths[collective.groups] = slowest_bandwidth(topology, collective, places)
        network += collective.sent / bandwidths[collective.groups]
    return Roofline(compute, costs.memory_bytes / topology.chip.memory_bandwidth, network)


def slowest_bandwidth(topology: Topology, collective: Collective, places: list) -> float:
    """Bytes/s a chip can send in the collective's least connected group."""
    # Groups of one collective are moved copies of each other, but those that a torus's edge cuts may be slower.
    groups = {group for group in collective.groups if len(group) > 1}
    return min(topology.bandwidth([places[chip] for chip in group]) for group in groups)


def _rate(topology: Topology, dtype: str) -> float:
    """FLOP/s at which operands of a dtype are multiplied."""
    chip = topology.chip
    if dtype in ("f32", "f64"):
        return chip.peak_bf16 / (2 if topology.is_gpu else 6)
    if dtype in ("s8", "u8", "s4", "u4", "s2", "u2") or dtype.startswith("f8"):
        # fp8 has its own rate on GPUs, that of int8; TPUs here convert it.
        return chip.peak_int8 if topology.is_gpu or not dtype.startswith("f8") else chip.peak_bf16
    return chip.peak_bf16
