"""A long run that saves every four steps: memory, descriptors and threads of its process must not grow.

python -m tests.faults.soak --minutes=30 --output=docs/benchmarks/soak.json

The first fifth of the samples is left out: allocators and caches fill up there. Slopes are least squares. The run has
to make steps all the time: one that stands still would hold its memory well.
"""

import argparse
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from tests.faults.__main__ import describe_machine  # noqa: E402
from tests.runs import ROOT, command_environment, prepare_digits, train_arguments  # noqa: E402

SECONDS_BETWEEN_SAMPLES = 5
WARM_UP = 0.2  # share of the samples
LEAST_PACE = 0.5  # steps a second in any twelfth of the time after that, as a share of those in all of it
# What an hour may add, noise of half an hour included: a leak of one object a save adds thousands.
LIMITS = {"rss_mib": 40.0, "descriptors": 2.0, "threads": 2.0}


def main() -> int:
    """Runs for the minutes asked for, ends the run by SIGTERM and reports; 1 if anything grew or it stood still."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--output", type=Path, help="a JSON file for the report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak_") as root:
        samples, saves = run(Path(root), 60 * options.minutes)
    report = {
        "command": f"python -m tests.faults.soak --minutes={options.minutes:g}",
        **describe_machine(),
        "load_average": os.getloadavg()[2],
        "minutes": options.minutes,
        "saves": saves,
        **judge(samples),
        "samples": samples,
    }
    text = json.dumps(report, indent=1)
    print(json.dumps({name: value for name, value in report.items() if name != "samples"}, indent=1))
    if options.output:
        options.output.write_text(text + "\n")
    return int(bool(report["grew"]) or report["stood_still"])


def run(root: Path, seconds: float) -> tuple[list[dict], int]:
    """Samples of the run's process, taken every few seconds, and how many checkpoints it has saved."""
    data, workdir = prepare_digits(root / "digits"), root / "run"
    fields = {"train__num_steps": 10**9, "checkpoint__every": 4, "log__heldout_every": 40}
    with open(root / "output", "w") as output:
        command = [sys.executable, "-m", "terdit_jax.main", *train_arguments(data, workdir, **fields)]
        streams = {"stdout": output, "stderr": output}
        process = subprocess.Popen(command, cwd=ROOT, env=command_environment(root / "cache"), **streams)
    samples, begun = [], time.monotonic()
    while time.monotonic() - begun < seconds:
        time.sleep(SECONDS_BETWEEN_SAMPLES)
        assert process.poll() is None, (root / "output").read_text()[-4000:]
        if steps := [int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()]:
            samples.append({"seconds": time.monotonic() - begun, "step": max(steps), **sample(process.pid)})
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 0, (root / "output").read_text()[-4000:]
    return samples, samples[-1]["step"] // 4


def sample(pid: int) -> dict:
    """Resident memory in MiB, open descriptors and threads of a process, of /proc."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return {
        "rss_mib": round(int(status["VmRSS"].split()[0]) / 1024, 2),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


def judge(samples: list[dict]) -> dict:
    """Slopes an hour and a save, ranges, the names of what grew, and whether the run stood still."""
    settled = samples[int(WARM_UP * len(samples)) :]
    hours = np.array([entry["seconds"] for entry in settled]) / 3600
    slopes, ranges = {}, {}
    for name in LIMITS:
        values = np.array([entry[name] for entry in settled], float)
        slopes[name] = round(float(np.polyfit(hours, values, 1)[0]), 3)
        ranges[name] = [float(values.min()), float(values.max())]
    saves = (settled[-1]["step"] - settled[0]["step"]) / 4
    per_save = slopes["rss_mib"] * 1024 * (hours[-1] - hours[0]) / max(1, saves)
    return {
        "slopes_an_hour": slopes,
        "ranges": ranges,
        "kib_a_save": round(float(per_save), 3),
        "stood_still": stood_still(settled),
        "grew": [name for name, limit in LIMITS.items() if slopes[name] > limit],
    }


def stood_still(samples: list[dict]) -> bool:
    """Whether a twelfth of the samples saw less than `LEAST_PACE` of the steps that it should have."""
    steps = np.array([entry["step"] for entry in samples])
    ends = np.linspace(0, len(steps) - 1, min(12, len(steps) - 1) + 1).astype(int)
    pace = np.diff(steps[ends]) / np.diff(ends)
    return bool(pace.min() < LEAST_PACE * (steps[-1] - steps[0]) / (len(steps) - 1) or steps[-1] == steps[0])


if __name__ == "__main__":
    sys.exit(main())
