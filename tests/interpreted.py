"""Mosaic kernels in tests: on Hopper GPUs as they are, elsewhere run by a NumPy machine, which knows no layouts."""

from collections.abc import Iterator
import contextlib

import jax
import jax.numpy as jnp
import pytest

from terdit_jax.fast.hopper import warpgroup

ON_HOPPER = warpgroup.run_on(jax.devices()[0])


@contextlib.contextmanager
def interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A context in which kernels run wherever the test does."""
    context = contextlib.nullcontext()
    if not ON_HOPPER:
        params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
        context = params.force_gpu_interpret_mode()
        for name in ("strided", "strided_half"):
            monkeypatch.setattr(warpgroup, name, lambda row: row)
        # Rows lie in memory's order here, so that they are one stretch.
        monkeypatch.setattr(warpgroup, "stretches", lambda width: [(0, width)])
        monkeypatch.setattr(warpgroup, "split", lambda row: tuple(row.reshape(-1, 2).astype(jnp.float32).T))
        join = lambda even, odd: jnp.stack([even, odd], axis=-1).ravel().astype(jnp.bfloat16)  # noqa: E731
        monkeypatch.setattr(warpgroup, "join", join)
        # Calls of the machine are effects to JAX, which rematerialised functions may have none of. They may here; what
        # they return JAX then keeps, and cuts 8 bits as IEEE had them, whose largest number is 240 and not 448.
        effects, checkpoint = (pytest.importorskip(f"jax._src.{name}") for name in ("effects", "ad_checkpoint"))
        monkeypatch.setattr(effects.remat_allowed_effects, "_effect_types", {effects.Effect})
        monkeypatch.setattr(checkpoint, "_insert_reduce_precision", lambda jaxpr, _: jaxpr)
    with context:
        jax.clear_caches()
        yield
    jax.clear_caches()
