"""Where every leaf of the 4.2B run lies, and in how many bytes, on four machines: as recorded.

A change of the rules, the state or the shipped configuration's mesh that is meant is recorded by
`python -m tests.golden_shardings`; the difference of the files then says what it does to each leaf.
"""

import json

import pytest

from tests.golden_shardings import CHIPS, describe, golden_file


@pytest.mark.parametrize("machine", CHIPS)
def test_every_leaf_lies_as_recorded(machine):
    assert describe(machine) == json.loads(golden_file(machine).read_text())


def test_what_is_recorded_is_cut_over_all_chips():
    for machine, chips in CHIPS.items():
        recorded = json.loads(golden_file(machine).read_text())
        # Four float32 arrays and a quarter byte of codes a parameter; what is not cut is below 1% of it on one chip.
        whole = 4_238_414_112 * 16.25
        assert whole / chips < recorded["bytes_per_chip"]["state"] < whole / chips + 0.01 * whole
