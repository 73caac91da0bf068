"""The cost of 8 bits is documented as it was measured."""

import json
from pathlib import Path

import numpy as np

from tests.commands import no_flags

with no_flags():
    from benchmarks.mode_error import NUMERICS, relative_errors, table

DOCS = Path(__file__).parent.parent / "docs"


def test_the_documentation_shows_what_the_figures_beside_it_say():
    rows = json.loads((DOCS / "benchmarks" / "mode_error_digits.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == list(NUMERICS)
    assert table(rows) in (DOCS / "deployment.md").read_text()


def test_errors_are_relative_to_each_timestep_s_eps():
    reference = np.stack([np.full((2, 2), 1.0), np.full((2, 2), 10.0)])
    np.testing.assert_allclose(relative_errors(reference + 1, reference), [1, 0.1])
