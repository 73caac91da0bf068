"""XLA's options for the training step, by platform, those that overlap communication with arithmetic among them.

They are handed over with the step (`jax.jit(..., compiler_options=...)`), not in the environment, so that a program
compiled for a machine that is not here is the one that runs there.
"""

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from terdit_jax.config import RunConfig
from terdit_jax.errors import UserError

Options = dict[str, bool | str]

# What changed the compiled step of 4.2B for the better, or names a default that it needs: docs/parallelism.md.
_OVERLAP: dict[str, Options] = {
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Gradients that all devices sum: small ones are sent slowly, so they leave together, each from where it lies;
        # the pass would copy them into one array first and out of it afterwards.
        "xla_gpu_all_reduce_combine_threshold_bytes": "120000000",
        "xla_disable_hlo_passes": "all-reduce-contiguous",
    },
    "tpu": {
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    },
}


# Trying Triton's kernels for each matmul takes minutes of compiling, most in 8 bits; cuBLASLt's are chosen in the end.
WITHOUT_TRITON: Options = {"xla_gpu_enable_triton_gemm": False}

# On CPUs: what needs little memory is run first, not what could run at the same time.
LAYER_BY_LAYER: Options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

_ALWAYS: dict[str, Options] = {
    "gpu": {
        **WITHOUT_TRITON,
        # A loop over layers would compute each matmul whose result is kept twice, once into the stack of what is kept.
        "xla_gpu_enable_dynamic_slice_fusion": False,
    },
}


def compiler_options(config: RunConfig, mesh: Mesh) -> Options:
    """The options that a run's step is compiled with, names without dashes; the run's own override the others.

    Raises:
      UserError: `config.train.compiler_options` is no list of --name=value.
    """
    platform = mesh.devices.flat[0].platform
    options = dict(_ALWAYS.get(platform, {}))
    if config.mesh.overlap and mesh.size > 1:
        options |= _OVERLAP.get(platform, {})
    return options | dict(_parse(word) for word in config.train.compiler_options.split())


def check_options(options: Options, device: jax.Device) -> None:
    """Compiles nothing at all with the options. Raises UserError where the device's compiler does not take one."""
    if not options:
        return
    nothing = jax.jit(lambda: 0, compiler_options=options, out_shardings=SingleDeviceSharding(device))
    try:
        nothing.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"XLA for {device.platform} refuses an option of config.train.compiler_options or config.mesh.overlap: "
            f"{' '.join(str(error).split())}"
        ) from error


def _parse(word: str) -> tuple[str, bool | str]:
    name, equals, value = word.removeprefix("--").partition("=")
    if not (word.startswith("--") and name and equals and value):
        raise UserError(f"config.train.compiler_options: {word!r} is no --name=value")
    # XLA reads numbers in text, but no booleans.
    return name, {"true": True, "false": False}.get(value.lower(), value)
