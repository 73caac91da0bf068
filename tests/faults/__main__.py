"""Runs cases by name: `python -m tests.faults --case=kill --rounds=50 --output=kill.json`.

`--case=damages` runs all kinds of damage to a checkpoint.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
from pathlib import Path
import platform
import subprocess
import sys
import tempfile
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402

from tests.faults.cases import CASES  # noqa: E402
from tests.faults.damages import DAMAGES, HALF_WRITTEN  # noqa: E402


def main() -> int:
    """Runs what the command line names; 1 if a round went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", required=True, choices=[*CASES, "damages"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=None, help="of the moments of kills; another each time if left out")
    parser.add_argument("--jobs", type=int, default=1, help="harnesses side by side that share the rounds")
    parser.add_argument("--output", type=Path, help="a JSON file for the report")
    options = parser.parse_args()
    names = [*DAMAGES, *HALF_WRITTEN] if options.case == "damages" else [options.case]
    report = {
        "command": "python -m tests.faults " + " ".join(a for a in sys.argv[1:] if not a.startswith("--output")),
        **describe_machine(),
        "cases": [_run_side_by_side(name, options.rounds, options.seed, options.jobs) for name in names],
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


def _run_side_by_side(name: str, rounds: int, seed: int | None, jobs: int) -> dict:
    """Like `_run`, with its rounds shared among `jobs` processes, each with data and an undisturbed run of its own."""
    if jobs == 1:
        return _run(name, rounds, seed)
    shares = [rounds // jobs + (job < rounds % jobs) for job in range(jobs)]

    def run(job: int) -> dict:
        command = [sys.executable, "-m", "tests.faults", f"--case={name}", f"--rounds={shares[job]}"]
        command += [] if seed is None else [f"--seed={seed + job}"]
        with tempfile.NamedTemporaryFile() as report:
            subprocess.run([*command, f"--output={report.name}"], stdout=subprocess.DEVNULL, check=False)
            return json.loads(Path(report.name).read_text())["cases"][0]

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(run, range(jobs)))
    merged = {"case": name, "rounds": rounds, "jobs": jobs, "wrong": None}
    for part in parts:
        merged["wrong"] = merged["wrong"] or part["wrong"]
        for key, value in part.items():
            if key in ("right", "details") or key.startswith("runs_"):
                merged[key] = merged[key] + value if key in merged else value
    return merged | {"seconds": max(part["seconds"] for part in parts)}


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
