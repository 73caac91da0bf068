"""Every test runs on eight CPU devices, so that meshes are real; float32 matmuls are exact to float32.

Where JAX_PLATFORMS is set it decides: JAX_PLATFORMS=cuda python -m pytest tests/test_hopper_forward.py runs kernels on
a GPU.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402

from tests.forked import programs  # noqa: E402

programs()  # made before pytest-xdist starts its workers, so that they share it
jax.config.update("jax_cpu_enable_async_dispatch", False)
