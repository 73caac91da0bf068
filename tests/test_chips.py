"""Figures of chips: the peak that a run's utilisation is measured against, and how fast they reach each other."""

import pytest

from terdit_jax.parallel.chips import CHIPS, find_chip, peak_flops, switch_bandwidth, torus_bandwidth

PEAKS = {  # TFLOP/s
    "NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100-SXM4-80GB": 312, "TPU v4": 275, "TPU v5 lite": 197,
    "TPU v5e": 197, "TPU v5": 459, "TPU v5p": 459, "TPU v6 lite": 918,
    **dict.fromkeys(("cpu", "", "NVIDIA GeForce RTX 4090", "TPU v3", "my TPU v4")),
}  # fmt: skip


def test_known_chips_have_a_peak_and_others_have_none():
    assert {kind: (peak_flops(kind) or 0) / 1e12 or None for kind in PEAKS} == PEAKS


def chip(name):
    return next(chip for chip in CHIPS if chip.name == name)


def test_device_kinds_find_their_chip():
    assert {chip.name: find_chip(kind).name for chip in CHIPS for kind in chip.kinds} == {c.name: c.name for c in CHIPS}


def test_interconnects_add_up_to_the_data_sheets():
    """Both ways, all ports: what Google's pages and NVIDIA's data sheets print, in GB/s."""
    printed = {"v4": 600, "v5e": 400, "v5p": 1200, "v6e": 800, "a100": 600, "h100": 900, "h200": 900}
    both_ways = {c.name: 2 * c.port_bandwidth * (2 * c.torus_dims or 1) / 1e9 for c in CHIPS}
    assert both_ways == printed


@pytest.mark.parametrize(
    ("name", "extents", "bandwidth"),
    [
        ("v5p", [(4, 1, 4), (4, 1, 4), (4, 1, 4)], 600e9),  # a whole cube: three closed rings
        ("v5p", [(4, 1, 8)], 100e9),  # half a ring is a line
        ("v5p", [(2, 1, 2)], 100e9),  # two chips are no ring
        ("v5p", [(4, 2, 8)], 100e9),  # every second chip of a ring: two such groups share its links
        ("v5e", [(16, 1, 16), (16, 1, 16)], 200e9),
        ("v5e", [(8, 1, 8), (8, 1, 8)], 100e9),  # v5e's torus closes at 16 only
        ("v6e", [(16, 1, 16)], 200e9),
    ],
)
def test_bandwidth_of_a_box_of_a_torus(name, extents, bandwidth):
    assert torus_bandwidth(chip(name), extents) == bandwidth


def test_bandwidth_of_switches_is_the_network_s_between_nodes():
    h200 = chip("h200")
    assert switch_bandwidth(h200, 8, 1) == 450e9
    assert switch_bandwidth(h200, 8, 8) == 400e9  # eight adapters of 400 Gbit/s
    assert switch_bandwidth(h200, 1, 8) == 50e9
