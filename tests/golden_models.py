"""The reference models of tests/golden: their configurations, parameters and recorded inputs and outputs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from terdit_jax.interop.published import StateDict, read_leaves
from terdit_jax.interop.start import master_params
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import abstract_params

GOLDEN = Path(__file__).parent / "golden"
DIT = {"family": "dit", "positions": "sincos_2d", "qk_norm": False}  # fields of the family
BY_CHANNEL = {"alpha_per": "channel", "gamma_per": "channel", "threshold": 0.7}  # the quantiser's, none as published


def tiny_config(**overrides) -> DiTConfig:
    """A small model in float32 with every option at its published value."""
    fields = dict(
        ternary=True, input_size=8, in_channels=4, patch_size=2, hidden_size=64, depth=3, num_heads=4, num_kv_heads=4,
        ffn_multiple_of=256, num_classes=10, class_dropout_prob=0.1, qk_norm=True, positions="rope_1d",
        adaln_rms_norm=True, alpha_init="normal",
    )  # fmt: skip
    overrides.setdefault("num_kv_heads", overrides.get("num_heads", 4))
    return DiTConfig(**{**fields, **overrides})


def golden_config(name: str) -> DiTConfig:
    meta = json.loads((GOLDEN / f"{name}.json").read_text())
    if meta["kind"] in ("dit", "sit"):
        sizes = {field: meta[field] for field in ("depth", "hidden_size", "num_heads")}
        return tiny_config(ternary=False, **DIT, **sizes)
    return tiny_config(
        ternary=meta["kind"] == "terdit", depth=meta["n_layers"], hidden_size=meta["dim"],
        num_heads=meta["n_heads"], qk_norm=meta["qk_norm"],
    )  # fmt: skip


def golden_params(config: DiTConfig, name: str) -> dict:
    """float32, ternary weights that the file holds packed as master weights that ternarise to the same codes."""
    state_dict = StateDict.of(load_file(GOLDEN / f"{name}.safetensors"))
    return jax.tree.map(jnp.asarray, master_params(config, read_leaves(config, state_dict)))


def random_params(config: DiTConfig, seed: int = 0) -> dict:
    """Parameters none of which is zero, for from the default start most gradients are zero for two steps.

    Drawn by NumPy: JAX would spend seconds compiling a generator for every shape.
    """
    generator = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = 0.15 * generator.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(noise + np.float32(path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def nhwc(x: np.ndarray) -> np.ndarray:
    """(..., C, H, W) of PyTorch to (..., H, W, C)."""
    return np.moveaxis(x, -3, -1)


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value, which must not be zero."""
    largest = np.abs(expected).max()
    assert largest > 0
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * largest)


def assert_trees_close(actual, expected, tolerance: float = 1e-5) -> None:
    """Every leaf within `tolerance` of its own largest value, the alphas within that of the largest among them all.

    The gradient of an alpha is one sum of a whole matrix of terms that cancel (to zero, up to rounding, where qk-norm
    makes the alphas of q and k scale-free), so its own size says nothing about its rounding. The gradient of keys' bias
    is zero, for it moves all of a query's scores alike: it is held to the size of the queries'.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = list(zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True))
    sizes = {jax.tree_util.keystr(path): float(np.abs(e).max()) for (path, _), e in pairs}
    alphas = [size for name, size in sizes.items() if name.endswith("['alpha']")]
    for (path, a), e in pairs:
        name = jax.tree_util.keystr(path)
        size = max(alphas) if name.endswith("['alpha']") else sizes[name.replace("['wk']['bias']", "['wq']['bias']")]
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=0, atol=tolerance * size, err_msg=name)
