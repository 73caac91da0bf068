"""Random weights of the FID Inception network under the PyTorch port's names."""

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
        for part, low, high in (
            ("weight", 0.7, 1.3),
            ("bias", -0.2, 0.2),
            ("running_mean", -0.2, 0.2),
            ("running_var", 0.5, 1.5),
        ):
            arrays[f"{name}.bn.{part}"] = rng.uniform(low, high, shape[0]).astype(np.float32)
    arrays["fc.weight"] = rng.standard_normal((CLASSES, POOL_FEATURES), np.float32) * np.float32(0.02)
    arrays["fc.bias"] = rng.standard_normal(CLASSES, np.float32)
    return arrays
