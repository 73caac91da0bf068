"""Machines by name, and how fast a group of their chips can talk."""

import math

import pytest

from terdit_jax.aot.topology import parse_topology
from terdit_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "chips", "grid"),
    [
        ("v5p:8x16x16", 2048, (8, 16, 16)),
        ("v4:2x2x1", 4, (2, 2, 1)),
        ("v5e:16x16", 256, (16, 16)),
        ("v6e:1x1", 1, (1, 1)),
        ("h200:8", 8, (1, 8)),
        ("h200:2", 2, (1, 2)),
        ("h200:64", 64, (8, 8)),
        ("cpu:8", 8, (8,)),
    ],
)
def test_names(name, chips, grid):
    topology = parse_topology(name)
    assert (topology.num_chips, topology.grid, topology.is_gpu) == (chips, grid, name.startswith("h200"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p", "give a chip and a shape"),
        ("v5p-64", "give a chip and a shape"),
        ("v5p:", "give a chip and a shape"),
        ("v9:4x4", "no chip 'v9' is known: give one of v4, v5e, v5p, v6e, h200"),
        ("v5p:4x4", "v5p takes 3 positive sizes"),
        ("v5e:4x4x4", "v5e takes 2 positive sizes"),
        ("v5e:0x4", "v5e takes 2 positive sizes"),
        ("h200:8x8", "h200 takes 1 positive size,"),
        ("h200:12", "give a multiple of 8"),
    ],
)
def test_what_is_no_machine_is_named(name, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_topology(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_bandwidth_follows_the_dimensions_that_a_group_extends_along():
    cube = parse_topology("v5p:4x4x8")
    everyone = [(x, y, z) for x in range(4) for y in range(4) for z in range(8)]
    assert cube.bandwidth(everyone) == 3 * 2 * 100e9
    assert cube.bandwidth([(1, 2, z) for z in range(8)]) == 2 * 100e9
    assert cube.bandwidth([(1, 2, z) for z in range(4)]) == 100e9
    assert cube.bandwidth([(1, 2, z) for z in range(0, 8, 2)]) == 100e9
    assert math.isinf(parse_topology("cpu:8").bandwidth([(0,), (1,)]))
