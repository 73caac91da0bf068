"""XLA's options come from platform, mesh and configuration, reach the step, and a wrong one is a line."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from terdit_jax.config import RunConfig
from terdit_jax.errors import UserError
from terdit_jax.parallel.compiler_options import check_options, compiler_options


def options_of(platform, num_devices=8, **fields):
    devices = np.array([SimpleNamespace(platform=platform)] * num_devices, object).reshape(1, num_devices, 1)
    config = RunConfig().with_fields({name.replace("__", "."): value for name, value in fields.items()})
    return compiler_options(config, SimpleNamespace(devices=devices, size=num_devices))


def test_what_hides_communication_is_on_where_there_is_some():
    assert options_of("gpu")["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert options_of("gpu")["xla_disable_hlo_passes"] == "all-reduce-contiguous"  # XLA takes names of no pass as well
    assert options_of("tpu") and all(name.startswith("xla_") for name in options_of("tpu"))
    for platform in ("gpu", "tpu"):
        alone = options_of(platform, num_devices=1)
        assert alone == options_of(platform, mesh__overlap=False)
        assert not any("all_gather" in name or "latency_hiding" in name for name in alone)
    assert not options_of("cpu")


def test_gpus_compute_what_a_loop_keeps_once():
    assert options_of("gpu", 1)["xla_gpu_enable_dynamic_slice_fusion"] is False
    assert not options_of("cpu", 1) and not options_of("tpu", 1)


def test_a_run_s_own_options_come_last():
    own = "--xla_gpu_enable_latency_hiding_scheduler=False  --xla_gpu_all_gather_combine_threshold_bytes=1024"
    options = options_of("gpu", train__compiler_options=own)
    assert options["xla_gpu_enable_latency_hiding_scheduler"] is False
    assert options["xla_gpu_enable_triton_gemm"] is False
    assert options["xla_gpu_all_gather_combine_threshold_bytes"] == "1024"
    assert options_of("cpu", train__compiler_options="--xla_dump_to=a=b") == {"xla_dump_to": "a=b"}


@pytest.mark.parametrize("word", ["xla_a=1", "--xla_a", "--xla_a=", "--=1", "--xla_a =1"])
def test_what_is_no_option_is_refused(word):
    with pytest.raises(UserError, match=r"config.train.compiler_options: '.*' is no --name=value"):
        options_of("cpu", train__compiler_options=word)


def test_options_that_the_compiler_does_not_take_are_refused():
    device = jax.devices()[0]
    check_options({}, device)
    check_options({"xla_cpu_enable_fast_math": False, "xla_backend_optimization_level": "1"}, device)
    for options, reason in (
        ({"xla_no_such_option": True}, "No such compile option: 'xla_no_such_option'"),
        ({"xla_cpu_enable_fast_math": "perhaps"}, "'perhaps' is not a valid bool value"),
    ):
        with pytest.raises(UserError, match=f"XLA for cpu refuses .*compiler_options.*{reason}") as caught:
            check_options(options, device)
        assert "\n" not in str(caught.value)
