"""The peak that a run's utilisation is measured against, by the names that JAX gives devices."""

import pytest

from terdit_jax.parallel.chips import peak_flops


@pytest.mark.parametrize(
    ("device_kind", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_known_chips(device_kind, teraflops):
    assert peak_flops(device_kind) == teraflops * 1e12


@pytest.mark.parametrize("device_kind", ["cpu", "", "NVIDIA GeForce RTX 4090", "TPU v3", "my TPU v4"])
def test_unknown_chips_have_no_peak(device_kind):
    assert peak_flops(device_kind) is None
