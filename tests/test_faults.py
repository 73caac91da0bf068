"""The harness of faults notices what it is there to notice, and what docs/reliability.md says is what it measured."""

import json
from pathlib import Path
import re
import subprocess
import sys

import pytest

from tests.faults.cases import CASES, _check_resumed
from tests.faults.damages import DAMAGES, HALF_WRITTEN
from tests.faults.soak import LIMITS, judge

ROOT = Path(__file__).parents[1]
REPORTS = sorted((ROOT / "docs" / "benchmarks").glob("faults_*.json"))


def test_a_run_that_begins_elsewhere_is_noticed():
    _check_resumed("resuming at step 1,230 in runs/x", 1230)
    _check_resumed("killed before it said anything", 1230)
    for output in ("resuming at step 1,220 in runs/x", "starting at step 0 in runs/x"):
        with pytest.raises(AssertionError, match="the newest sound checkpoint is 1230"):
            _check_resumed(output, 1230)


def test_every_damage_is_a_case():
    assert {*DAMAGES, *HALF_WRITTEN} < set(CASES)


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_documented_figures_are_those_of_the_reports(path):
    report = json.loads(path.read_text())
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert report["command"].startswith("python -m tests.faults --case=")
    for case in report["cases"]:
        assert case["wrong"] is None and case["right"] == case["rounds"] == len(case["details"])
        row = re.search(rf"^\| `{case['case']}` \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
        expected = (case["rounds"], case["right"], case["runs_compared_bit_for_bit"])
        assert tuple(map(int, row.groups())) == expected
    assert report["date"] in text and report["versions"]["jax"] in text


@pytest.mark.slow
@pytest.mark.parametrize("case", ["kill", "sigterm_repeated", "half_written"])
def test_a_round_by_the_command(case, tmp_path):
    output = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.faults", f"--case={case}", "--rounds=2", f"--output={output}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(output.read_text())["cases"]
    assert found["right"] == 2 and found["runs_compared_bit_for_bit"] >= 1


@pytest.mark.slow
def test_a_round_that_goes_wrong_is_said_and_ends_with_status_1(tmp_path):
    """A damage that does nothing: nothing falls back, and the case must say so."""
    code = (
        "import sys; sys.argv = ['faults', '--case=flipped']; sys.path.insert(0, 'tests')\n"
        "import tests.faults.damages as d; d.DAMAGES['flipped'] = lambda step: None\n"
        "import runpy; runpy.run_module('tests.faults', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "WRONG in round 1" in done.stderr, done.stderr


STEADY = [
    {"seconds": 5.0 * i, "step": 40 * i, "rss_mib": 500 + i % 3, "descriptors": 40 + i % 2, "threads": 30}
    for i in range(1, 200)
]


@pytest.mark.parametrize("last", [0, 50, 150, 190])
def test_the_soak_notices_a_run_that_stands_still(last):
    assert not judge(STEADY)["stood_still"]
    assert judge([entry | {"step": min(entry["step"], 40 * last)} for entry in STEADY])["stood_still"]


def test_the_soak_notices_what_grows():
    assert judge(STEADY)["grew"] == []
    for name in LIMITS:
        growing = [entry | {name: entry[name] + 0.2 * i} for i, entry in enumerate(STEADY)]
        assert judge(growing)["grew"] == [name]
