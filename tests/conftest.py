"""Every test runs on eight CPU devices, so that meshes are real; float32 matmuls are exact to float32.

Where JAX_PLATFORMS is set it decides: JAX_PLATFORMS=cuda python -m pytest tests/test_hopper_forward.py runs kernels on
a GPU.
Tests spend their time compiling, so XLA optimises little: a fifth of the time. The fixture `optimised` is for tests of
equal bits in programs that differ: without optimisation XLA rounds the same sums otherwise in each.
"""

import importlib.metadata
import os

FLAGS = "--xla_force_host_platform_device_count=8"
HAS_OTHER_EMITTERS = importlib.metadata.version("jax").startswith("0.10.")  # later XLA ends at a flag that is gone
if HAS_OTHER_EMITTERS:
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.forked import programs  # noqa: E402
from tests.stub_hub import hub  # noqa: E402, F401

programs()  # made before pytest-xdist starts its workers, so that they share it
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def optimised(monkeypatch):
    """The programs of this test are compiled as users' are."""
    compiler = pytest.importorskip("jax._src.compiler")
    options = compiler.get_compile_options

    def as_users(*arguments, env_options_overrides=None, **others):
        overrides = {"xla_cpu_use_fusion_emitters": True} if HAS_OTHER_EMITTERS else {}
        overrides |= env_options_overrides or {}
        return options(*arguments, env_options_overrides=overrides, **others)

    monkeypatch.setattr(compiler, "get_compile_options", as_users)
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
