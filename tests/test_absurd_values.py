"""Absurd values of every flag and field are refused in one line; absurd_values.py says how, and gives all of them."""

from collections import defaultdict
import json
import os
from pathlib import Path
import zlib

import pytest

from tests import absurd_values
from tests.absurd_values import ACCEPTED, FINE, Case, all_cases

REPORT = Path(__file__).parents[1] / "docs" / "benchmarks" / "absurd_values.json"


def by_name():
    """The cases of each flag and field of each command."""
    found = defaultdict(list)
    for case in all_cases():
        found[case.command, case.name].append(case)
    return found


def test_every_flag_and_field_has_eight_values_and_more():
    for name, cases in by_name().items():
        absurd = [case for case in cases if not case.is_in(ACCEPTED)]
        where_all_is_taken = any(name[1] == of or of in name[1] for of in ("config.name", "compiler_options"))
        assert len({case.value for case in cases}) == len(cases) >= 11
        assert len(absurd) >= 8 or name[0] == "compile" or where_all_is_taken, name


def test_every_row_of_the_tables_is_still_needed():
    cases = list(all_cases())
    for table in (ACCEPTED, FINE):
        for row in table:
            assert any(case.is_in({row: ""}) for case in cases), row


def test_one_value_of_each_flag_and_field(tmp_path):
    """A field of the configuration is given to one of the two commands that read it."""
    chosen = {}
    for (command, name), cases in by_name().items():
        absurd = [case for case in cases if not case.is_in(ACCEPTED)]
        if absurd and (command != "compile" or not name.startswith("config.")):
            chosen[command, name] = absurd[zlib.crc32(name.encode()) % len(absurd)]
    results = list(absurd_values.run(list(chosen.values()), tmp_path, jobs=2))
    wrong = [result for result in results if result["result"] != "refused"]
    assert not wrong, "\n".join(map(json.dumps, wrong))
    assert len(results) == len(chosen) > 120


@pytest.mark.slow
def test_every_value(tmp_path):
    results = absurd_values.run(list(all_cases()), tmp_path, jobs=os.cpu_count())
    wrong = [result for result in results if result["result"] == "FAILED"]
    assert not wrong, "\n".join(map(json.dumps, wrong))


ONE_LINE = "error: --seed=-1: must be positive\n"


@pytest.mark.parametrize(
    ("status", "errors", "changed", "wrong"),
    [
        (2, ONE_LINE, set(), []),
        (1, ONE_LINE, set(), ["status 1"]),
        (None, "", set(), ["status None", "0 lines instead of one"]),
        (2, "Traceback\n" + ONE_LINE, set(), ["2 lines instead of one"]),
        (2, "error: it cannot be\n", set(), ["names neither the flag nor the value"]),
        (2, ONE_LINE[:-1] + "s" * 1000, set(), ["a line of 1034 characters"]),
        (2, ONE_LINE, {"new"}, ["wrote ['new']"]),
        (2, ONE_LINE, {"notes.txt"}, ["overwrote ['notes.txt']", "wrote ['notes.txt']"]),
        (0, "", {"new"}, ["accepted, which no row of ACCEPTED explains"]),
        (0, "", {"notes.txt"}, ["overwrote ['notes.txt']", "accepted, which no row of ACCEPTED explains"]),
    ],
)
def test_what_is_wrong_is_noticed(status, errors, changed, wrong):
    case = Case("sample", "seed", "-1")
    assert list(absurd_values._faults(case, status, errors, {"notes.txt"}, changed)) == wrong


def test_documented_figures_are_those_of_the_report():
    report = json.loads(REPORT.read_text())
    text = (REPORT.parents[1] / "reliability.md").read_text()
    for command, found in report["commands"].items():
        row = [found["flags_and_fields"], found["cases"], found["refused"], found.get("accepted", 0), 0]
        assert f"| `{command}` | " + " | ".join(f"{count:,}" for count in row) + " |" in text
    assert "FAILED" not in report["all"] and report["all"]["cases"] == len(list(all_cases()))
