"""Two processes joined by jax.distributed on loopback train the run that one process trains."""

import socket

import jax
import numpy as np
from runs import FAST_COMPILATION, finish, metrics_without_timing, prepare_digits, saved_run, start, train_arguments


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_two_processes_equal_one(tmp_path):
    data, cache = prepare_digits(tmp_path / "digits"), tmp_path / "cache"
    arguments = {"train__num_steps": 12, "checkpoint__every": 12, "mesh__fsdp": 2}
    flags = {"XLA_FLAGS": f"{FAST_COMPILATION} --xla_force_host_platform_device_count=4"}
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start("main", *train_arguments(data, one, **arguments), cache=cache, environment=flags))
    flags = {
        "XLA_FLAGS": f"{FAST_COMPILATION} --xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    both = [
        start(
            "main",
            *train_arguments(data, two, **arguments),
            cache=cache,
            environment=flags | {"JAX_PROCESS_ID": str(process)},
        )
        for process in range(2)
    ]
    (out, _), (quiet, _) = [finish(process) for process in both]
    # Only the first process speaks.
    assert "4 x cpu, 2 process(es)" in out and "step" not in quiet
    (expected, _), (state, run) = saved_run(one), saved_run(two)
    assert run["step"] == 12
    for a, e in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(expected["params"]), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-3)
    for ours, theirs in zip(metrics_without_timing(two), metrics_without_timing(one), strict=True):
        np.testing.assert_allclose(ours["step"], theirs["step"])
        for name in ("loss", "heldout_loss"):
            if name in theirs:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4)
