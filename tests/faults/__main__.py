"""Runs cases by name: `python -m tests.faults --case=kill --rounds=50 --output=kill.json`.

`--case=damages` runs all kinds of damage to a checkpoint.
"""

import argparse
import datetime
import json
import os
from pathlib import Path
import platform
import sys
import tempfile
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402

from .cases import CASES  # noqa: E402
from .damages import DAMAGES, HALF_WRITTEN  # noqa: E402


def main() -> int:
    """Runs what the command line names; 1 if a round went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", required=True, choices=[*CASES, "damages"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=None, help="of the moments of kills; another each time if left out")
    parser.add_argument("--output", type=Path, help="a JSON file for the report")
    options = parser.parse_args()
    names = [*DAMAGES, *HALF_WRITTEN] if options.case == "damages" else [options.case]
    report = {
        "command": "python -m tests.faults " + " ".join(sys.argv[1:]),
        **describe_machine(),
        "cases": [_run(name, options.rounds, options.seed) for name in names],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    return int(any(case["wrong"] for case in report["cases"]))


def describe_machine() -> dict:
    """The date, the machine and the versions that a report was made with."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "processor": _processor(), "system": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "orbax": ocp.__version__,
        },
    }


def _run(name: str, rounds: int, seed: int | None) -> dict:
    begun, done, summary, wrong = time.monotonic(), [], {}, None
    with tempfile.TemporaryDirectory(prefix=f"faults_{name}_", ignore_cleanup_errors=True) as root:
        try:
            for result in CASES[name](Path(root), rounds, seed):
                if "round" in result:
                    done.append(result)
                else:
                    summary |= result
                print(f"{name}: {result}", file=sys.stderr, flush=True)
        except AssertionError as error:
            wrong = str(error)[-4000:] or "an assertion without a message"
            print(f"{name}: WRONG in round {len(done) + 1}: {wrong}", file=sys.stderr, flush=True)
    return {
        "case": name,
        "rounds": rounds,
        "right": len(done),
        "wrong": wrong,
        **summary,
        "seconds": round(time.monotonic() - begun),
        "details": done,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
