"""Lets the processes of one run find each other, and JAX its devices: one line where it cannot be.

Variables of the environment that launchers set are checked here, before `jax.distributed` believes them.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import os
import re
import subprocess
import sys
import threading
from typing import Any

import jax

from terdit_jax.errors import UserError, exit_with, in_a_line

JOIN_SECONDS = 90

_COUNT, _ID, _ADDRESS = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"
# Any of these says that a cluster has started several processes of this program; jax.distributed finds the rest.
_CLUSTER_ADDRESSES = (_ADDRESS, "COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
# The variable that gives a launcher's number of processes -> those that jax.distributed reads: numbers, of which the
# count and the rank come first, and a text.
_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": (  # set by srun only
        ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"), "SLURM_STEP_NODELIST",
    ),
    "OMPI_COMM_WORLD_SIZE": (
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"), "OMPI_MCA_orte_hnp_uri",
    ),
}  # fmt: skip
_BY_HAND = f"set {_ADDRESS}, {_COUNT} and {_ID}, or none of them"


def initialize_processes() -> None:
    """Joins the processes of a multi-process run through `jax.distributed`; does nothing in a single process.

    A run has several processes when a TPU pod, SLURM or Open MPI started it, or when JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID are set.

    Raises:
      UserError: variables that do not fit together. Where the other processes do not come, this one ends with one line
        and status 1, for they may come later.
    """
    if jax.distributed.is_initialized():
        return
    arguments = read_launch(os.environ)
    if arguments is None:
        return
    # A process that dies must end the others in less than two minutes; by default they would wait for up to five.
    arguments |= {"heartbeat_timeout_seconds": 45, "shutdown_timeout_seconds": 60}
    with _time_limit(os.environ.get(_ADDRESS, "the address that its launcher gave")):
        try:
            jax.distributed.initialize(**arguments, initialization_timeout=10 * JOIN_SECONDS)
        except Exception as error:  # whatever a launcher's module or the coordination service raises
            raise UserError(f"cannot join the run's other processes ({in_a_line(error)}): {_BY_HAND}") from error


def read_launch(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; {} where it finds all by itself, None for a single process.

    Raises:
      UserError: a variable without the others that it needs, or with a value that cannot be.
    """
    if _COUNT in environment or _ID in environment:
        return _read_jax(environment)
    for name in _CLUSTER_ADDRESSES:
        if name in environment:
            _check_address(name, environment[name], port_needed=name == _ADDRESS)
    several = False
    for name, needed in _LAUNCHERS.items():
        if name in environment and _integer(environment, name) > 1:
            _check_launcher(environment, name, *needed)
            several = True
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) > 1:
        if not all(host.strip() for host in hosts):
            raise UserError(f"TPU_WORKER_HOSTNAMES={','.join(hosts)}: names an empty host")
        worker = _integer(environment, "TPU_WORKER_ID") if "TPU_WORKER_ID" in environment else 0
        if worker >= len(hosts):
            raise UserError(f"TPU_WORKER_ID={worker}: TPU_WORKER_HOSTNAMES names {len(hosts)}, numbered from 0")
        several = True
    return {} if several or any(name in environment for name in _CLUSTER_ADDRESSES) else None


def check_devices() -> None:
    """Opens JAX's devices. Raises UserError where XLA_FLAGS or JAX_PLATFORMS name what is not there."""
    _check_xla_flags(os.environ.get("XLA_FLAGS", ""))
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        # A platform without its plug-in ends in an AssertionError without words.
        chosen = os.environ.get("JAX_PLATFORMS")
        what = f"JAX_PLATFORMS={chosen}: there is no such device here" if chosen else "JAX finds no device"
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "its plug-in is not installed"
        raise UserError(f"{what}; leave it out or name another ({' '.join(reason.split())[:200]})") from error


@contextlib.contextmanager
def _time_limit(address: str) -> Iterator[None]:
    """Ends the process with one line if its body takes longer than JOIN_SECONDS; XLA would abort with its own stack."""
    line = (
        f"the run's processes have not met at {address} within {JOIN_SECONDS} s: start all of them, and check that "
        "this host reaches that address"
    )
    timer = threading.Timer(JOIN_SECONDS, exit_with, (line, 1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read_jax(environment: Mapping[str, str]) -> dict[str, Any] | None:
    for name, other in ((_COUNT, _ID), (_ID, _COUNT)):
        if name not in environment and not (name == _ID and environment[_COUNT] == "1"):
            raise UserError(f"{other}={environment[other]} without {name}: {_BY_HAND}")
    count = _integer(environment, _COUNT)
    process = _integer(environment, _ID) if _ID in environment else 0
    if not 1 <= count <= 2**20:
        raise UserError(f"{_COUNT}={count}: give the number of processes, from 1 to {2**20}")
    if process >= count:
        raise UserError(f"{_ID}={process}: processes are numbered from 0 to {_COUNT} - 1, here {count - 1}")
    if _ADDRESS not in environment:
        if count == 1:
            return None
        raise UserError(f"{_COUNT}={count} without {_ADDRESS}: set it to HOST:PORT of process 0")
    _check_address(_ADDRESS, environment[_ADDRESS], port_needed=True)
    return {"coordinator_address": environment[_ADDRESS], "num_processes": count, "process_id": process}


def _check_launcher(environment: Mapping[str, str], name: str, numbers: tuple[str, ...], text: str) -> None:
    for needed in (*numbers, text):
        if not environment.get(needed, "").strip():
            raise UserError(f"{name}={environment[name]} without {needed}: start it by srun or mpirun, or {_BY_HAND}")
    size, place, *_ = (_integer(environment, number) for number in numbers)
    count, rank, *_ = numbers
    if size != _integer(environment, name):
        raise UserError(f"{count}={size}, but {name}={environment[name]}: start it by one srun of all processes")
    if place >= size:
        raise UserError(f"{rank}={place}: there are {size} processes ({count}), numbered from 0")


def _integer(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not re.fullmatch(r"[0-9]{1,18}", text.strip()):
        raise UserError(f"{name}={text}: give a whole number, or leave it unset")
    return int(text)


def _check_address(name: str, address: str, port_needed: bool) -> None:
    host, colon, port = address.rpartition(":") if ":" in address else (address, "", "")
    if port_needed and not colon:
        raise UserError(f"{name}={address}: has no port; give HOST:PORT of process 0")
    if not host.strip() or re.search(r"[\s/]", address):
        raise UserError(f"{name}={address}: names no host; give HOST:PORT of process 0")
    if colon and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise UserError(f"{name}={address}: {port!r} is no port; give a number from 1 to 65535")


@functools.cache
def _check_xla_flags(given: str) -> None:
    """XLA ends the process where it does not know a flag, so another process tries them first."""
    if not given.strip():
        return
    code = "from jaxlib import _jax; _jax.CompileOptions()"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if tried.returncode and "Traceback" not in tried.stderr:  # which would be of Python, not of XLA
        words = [line.partition("] ")[2] or line for line in tried.stderr.splitlines() if line.strip()]
        reason = next((line for line in words if "flag" in line.lower()), "no reason given")
        raise UserError(f"XLA_FLAGS={given}: XLA refuses them ({reason[:200]})")
