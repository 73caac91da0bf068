"""Variables of launchers that are half set or wrong end in one line, and so do devices that are not there."""

import os
import subprocess
import sys
import time

import pytest

from terdit_jax.errors import UserError
from terdit_jax.parallel.processes import read_launch
from tests.runs import ROOT, free_port

ADDRESS = "JAX_COORDINATOR_ADDRESS"
SLURM = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-004]",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}  # fmt: skip


def by_hand(count="2", process="1", address="host:1234"):
    given = {"JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": process, ADDRESS: address}
    return {name: value for name, value in given.items() if value is not None}


def by_hand_call(**arguments):
    return {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1} | arguments


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (by_hand(), by_hand_call()),
        (by_hand(count="1", process="0"), by_hand_call(num_processes=1, process_id=0)),
        (by_hand(address="[::1]:1234"), by_hand_call(coordinator_address="[::1]:1234")),
        (SLURM, {}),
        (SLURM | {ADDRESS: "host:1234"}, {}),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, None),  # an allocation without srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        (OPEN_MPI, {}),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": ""}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "host"}, {}),
    ],
)
def test_launchers_are_known_by_their_variables(environment, launch):
    assert read_launch(environment) == launch


WRONG = [
    *((by_hand(count=n), f"JAX_NUM_PROCESSES={n}: give") for n in ("two", "0", "-1", "", "2.0", "٢", "9" * 30)),
    *((by_hand(process=n), f"JAX_PROCESS_ID={n}: ") for n in ("2", "-1", "one", "", "1e0", "0x1", "9" * 9)),
    (by_hand(process=None), "JAX_NUM_PROCESSES=2 without JAX_PROCESS_ID: set JAX_COORDINATOR_ADDRESS, "),
    (by_hand(count=None), "JAX_PROCESS_ID=1 without JAX_NUM_PROCESSES: set"),
    (by_hand(address=None), "JAX_NUM_PROCESSES=2 without JAX_COORDINATOR_ADDRESS: set it to HOST:PORT"),
    *((by_hand(address=a), f"{ADDRESS}={a}: has no port") for a in ("", "host", "10.0.0.1")),
    *((by_hand(address=a), f"{ADDRESS}={a}: .* is no port") for a in ("a:", "a:x", "a:0", "a:65536", "a:-1")),
    *((by_hand(address=a), f"{ADDRESS}={a}: names no host") for a in (":1", " :1", "http://a:1", "a b:1")),
    ({ADDRESS: "host"}, f"{ADDRESS}=host: has no port"),
    ({"COORDINATOR_ADDRESS": ""}, "COORDINATOR_ADDRESS=: names no host"),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "host:port"}, "MEGASCALE_COORDINATOR_ADDRESS=host:port: 'port' is no port"),
    *((SLURM | {"SLURM_STEP_NUM_TASKS": value}, "SLURM_STEP_NUM_TASKS=") for value in ("", "two", "-4", "8")),
    *(({k: v for k, v in SLURM.items() if k != name}, f"without {name}: start it by srun") for name in list(SLURM)[1:]),
    *((SLURM | {name: ""}, f"without {name}: start it by srun") for name in list(SLURM)[1:]),
    *((SLURM | {name: "x"}, f"{name}=x: give a whole number") for name in list(SLURM)[1:5]),
    (SLURM | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4: there are 4 processes"),
    *((OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": value}, "OMPI_COMM_WORLD_SIZE=") for value in ("", "two", "-2")),
    *(({k: v for k, v in OPEN_MPI.items() if k != name}, f"without {name}: start") for name in list(OPEN_MPI)[1:]),
    (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK=2: there are 2 processes"),
    ({"TPU_WORKER_HOSTNAMES": "a,,b"}, "TPU_WORKER_HOSTNAMES=a,,b: names an empty host"),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "2"}, "TPU_WORKER_ID=2: TPU_WORKER_HOSTNAMES names 2"),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "x"}, "TPU_WORKER_ID=x: give a whole number"),
]


@pytest.mark.parametrize(("environment", "message"), WRONG)
def test_variables_that_do_not_fit_together_are_named(environment, message):
    with pytest.raises(UserError, match=message) as caught:
        read_launch(environment)
    assert "\n" not in str(caught.value)


JOIN = """
import sys
from terdit_jax.errors import run_command
from terdit_jax.parallel import processes
processes.JOIN_SECONDS = 2
def main(argv):
    processes.initialize_processes()
    processes.check_devices()
run_command(main)
"""


def answer(environment, status):
    """The line that a command ends with, and how long it took."""
    begin = time.monotonic()
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-c", JOIN], env=clean | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and not done.stdout
    return line, time.monotonic() - begin


@pytest.mark.parametrize("process", ["0", "1"])
def test_processes_that_do_not_meet_end_in_time_and_may_be_started_again(process):
    """Nobody listens at the address, and nobody comes: status 1, at which launch/supervise.sh tries again."""
    line, seconds = answer(by_hand(process=process, address=f"localhost:{free_port()}"), status=1)
    assert "have not met at localhost:" in line and "within 2 s" in line and seconds < 30


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({ADDRESS: "localhost:1234"}, "cannot join the run's other processes (ValueError: Number of processes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cannot join the run's other processes"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "garbage"}, "invalid literal for int() with base 10: 'garbage'"),
        ({"JAX_PLATFORMS": "nonsense"}, "JAX_PLATFORMS=nonsense: there is no such device here"),
        ({"JAX_PLATFORMS": "cpu,rocm"}, "JAX_PLATFORMS=cpu,rocm: there is no such device here"),
        ({"XLA_FLAGS": "--xla_no_such_flag=1"}, "XLA refuses them (Unknown flag in XLA_FLAGS: --xla_no_such_flag=1)"),
        ({"XLA_FLAGS": "nonsense"}, "XLA_FLAGS=nonsense: XLA refuses them"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=0"}, "there is no such device here"),
    ],
)
def test_what_jax_raises_is_one_line(environment, message):
    line, _ = answer(environment, status=2)
    assert message in line
