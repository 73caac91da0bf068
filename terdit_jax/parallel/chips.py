"""What the vendors say their chips can do, for the utilisation a run reports."""

# Dense bf16 FLOP/s a JAX device, by a prefix of its `device_kind`; vendors' data sheets, without sparsity.
_PEAK_BF16 = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p; behind the two that its name begins
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device, or None where it is not known (CPUs among them)."""
    return next((peak for prefix, peak in _PEAK_BF16.items() if device_kind.startswith(prefix)), None)
