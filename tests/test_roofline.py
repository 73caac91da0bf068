"""The roofline's arithmetic, with figures small enough to check by hand."""

import pytest

from terdit_jax.aot.collectives import Collective
from terdit_jax.aot.costs import Costs
from terdit_jax.aot.roofline import Roofline, make_roofline
from terdit_jax.aot.topology import parse_topology

GROUP = ((0, 1, 2, 3, 4, 5, 6, 7),)


def gather(size, trips=1, groups=GROUP):
    return Collective("all-gather", "u8", (size,), groups, trips, "g", "")


def places(topology):
    return [topology.place(i, None) for i in range(topology.num_chips)]


def test_each_part_is_work_over_rate():
    node = parse_topology("h200:8")
    costs = Costs({"bf16": 989e12, "s8": 1979e12, "f8e4m3fn": 1979e12, "f32": 989e12 / 2}, 4800e9 * 2)
    roofline = make_roofline(node, costs, [gather(450_000_000, trips=10)], places(node))
    assert roofline.compute == pytest.approx(4) and roofline.memory == pytest.approx(2)
    assert roofline.network == pytest.approx(10 * 0.45 * 7 / 8 / 450)


@pytest.mark.parametrize(
    ("size", "groups", "seconds"),
    [
        (400_000_000, (tuple(range(16)),), 0.4 * 15 / 16 / 400),  # between nodes the network counts
        (100_000_000, ((0, 1), (2, 8)), 0.1 / 2 / 50),  # the slowest group decides
    ],
)
def test_groups_over_two_nodes(size, groups, seconds):
    nodes = parse_topology("h200:16")
    roofline = make_roofline(nodes, Costs({}, 0), [gather(size, groups=groups)], places(nodes))
    assert roofline.network == pytest.approx(seconds)


def test_overlapped_and_in_turn():
    roofline = Roofline(compute=3.0, memory=2.0, network=1.0)
    assert (roofline.overlapped, roofline.in_turn, roofline.bound) == (3.0, 6.0, "compute")
    assert Roofline(compute=1.0, memory=2.0, network=5.0).bound == "network"


def test_cpus_have_no_roofline():
    assert make_roofline(parse_topology("cpu:8"), Costs({}, 0), [], []) is None
