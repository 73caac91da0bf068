"""Mosaic kernels in tests: on Hopper GPUs as they are, elsewhere run by a NumPy machine, which knows no layouts."""

from collections.abc import Iterator
import contextlib

import jax
import pytest

from terdit_jax.kernels import mosaic

ON_HOPPER = jax.default_backend() == "gpu" and jax.devices()[0].compute_capability.startswith("9.")


@contextlib.contextmanager
def interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A context in which kernels run wherever the test does."""
    context = contextlib.nullcontext()
    if not ON_HOPPER:
        params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
        context = params.force_gpu_interpret_mode()
        monkeypatch.setattr(mosaic, "strided", lambda vector: vector)
    with context:
        jax.clear_caches()
        yield
    jax.clear_caches()
