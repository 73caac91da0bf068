"""Random weights of the FID Inception network under the PyTorch port's names, and graphs that hold constants."""

import struct

import numpy as np

from terdit_jax.evaluation.inception import CLASSES, POOL_FEATURES, kernels


def random_state_dict(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that keep the size of activations, batch norms far from their start."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in kernels().items():
        arrays[f"{name}.conv.weight"] = rng.standard_normal(shape, np.float32) * np.float32(
            np.sqrt(2 / np.prod(shape[1:]))
        )
        arrays[f"{name}.bn.weight"] = rng.uniform(0.7, 1.3, shape[0]).astype(np.float32)
        arrays[f"{name}.bn.bias"] = rng.uniform(-0.2, 0.2, shape[0]).astype(np.float32)
        arrays[f"{name}.bn.running_mean"] = rng.uniform(-0.2, 0.2, shape[0]).astype(np.float32)
        arrays[f"{name}.bn.running_var"] = rng.uniform(0.5, 1.5, shape[0]).astype(np.float32)
    arrays["fc.weight"] = rng.standard_normal((CLASSES, POOL_FEATURES), np.float32) * np.float32(0.02)
    arrays["fc.bias"] = rng.standard_normal(CLASSES, np.float32)
    return arrays


def varint(number: int) -> bytes:
    encoded = b""
    while number > 127:
        encoded, number = encoded + bytes([number & 127 | 128]), number >> 7
    return encoded + bytes([number])


def field(number: int, content: bytes | int) -> bytes:
    """A field of a protobuf message."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def constant(name: str, array: np.ndarray, op: bytes = b"Const", dtype: int = 1, packed: bool = False) -> bytes:
    """A node of a graph; with `packed`, its numbers as floats in place of bytes."""
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    content = np.ascontiguousarray(array, "<f4").tobytes()
    tensor = field(1, dtype) + field(2, shape) + field(5 if packed else 4, content)
    attributes = field(5, field(1, b"dtype") + field(2, field(6, dtype)))
    attributes += field(5, field(1, b"value") + field(2, field(8, tensor)))
    return field(1, field(1, name.encode()) + field(2, op) + attributes)


def fixed32(number: int, value: float) -> bytes:
    return varint(number << 3 | 5) + struct.pack("<f", value)
