"""Models of a few thousand parameters in every place that weights come from, for tests that read and write them."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from terdit_jax.checkpoints.writer import CheckpointWriter
from terdit_jax.config import RunConfig
from terdit_jax.config_sections import DiffusionConfig, ModelConfig, SampleConfig
from terdit_jax.data.synthetic import make_synthetic
from terdit_jax.interop.description import Description, architecture
from terdit_jax.interop.published import StateDict, model_leaves, params_leaves, read_leaves
from terdit_jax.interop.weights import Weights
from terdit_jax.model.config import DiTConfig
from terdit_jax.training.resume import describe_run
from tests.golden_models import BY_CHANNEL, DIT, GOLDEN, golden_config, random_params, tiny_config

# Every choice that gives tensors other names, shapes or meanings.
VARIANTS = {
    "published": {},
    "grouped heads": {"num_kv_heads": 1},
    "sincos positions": {"positions": "rope_1d_sincos_2d"},
    "no norms": {"qk_norm": False, "adaln_rms_norm": False},
    "Large-DiT": {"ternary": False},
    "ternary DiT": DIT,
    "DiT": {**DIT, "ternary": False},
    "flow without variance": {"learn_sigma": False},
    "by channel": {**BY_CHANNEL, "num_kv_heads": 1},
    "ternary DiT by channel": {**DIT, **BY_CHANNEL},
}


def small_config(**overrides) -> DiTConfig:
    fields = {"hidden_size": 32, "depth": 2, "num_heads": 2, "ffn_multiple_of": 32}
    return tiny_config(**{**fields, **overrides})


def describe(model: DiTConfig, **fields) -> Description:
    """A description of a model that draws latents as they are."""
    described = ModelConfig(**{name: getattr(model, name) for name in vars(ModelConfig())})
    sample = SampleConfig(num_steps=5, cfg_scale=2.0)
    plain = dict(name="tiny", ema=True, step=7, codec="none", latent_scale=1.0, sample=sample, provenance={"seed": "0"})
    plain["diffusion"] = DiffusionConfig("ddpm" if model.learn_sigma else "flow")
    return Description(model=architecture(described), **{**plain, **fields})


def weights_of(model: DiTConfig, params: dict, **fields) -> Weights:
    """Weights of parameters in memory; `fields` of their description."""
    arrays = {path: np.asarray(leaf) for path, leaf in params_leaves(params)}
    paths = [leaf.path for leaf in model_leaves(model)]
    return Weights("memory", describe(model, **fields), lambda: ((path, arrays[path]) for path in paths), masters=True)


def random_weights(model: DiTConfig, **fields) -> Weights:
    return weights_of(model, random_params(model), **fields)


def golden_weights(name: str, model: DiTConfig | None = None) -> Weights:
    """A golden state dict as it would come from a file that describes itself."""
    model = model or golden_config(name)
    state_dict = StateDict.of(load_file(GOLDEN / f"{name}.safetensors"))
    masters = all(dtype != np.uint8 for dtype, _ in state_dict.layout.values())
    return Weights(name, describe(model), partial(read_leaves, model, state_dict), masters)


def make_workdir(path: Path, steps: tuple[int, ...] = (1, 2), **model) -> dict[int, tuple[dict, dict]]:
    """A workdir with checkpoints of a run that was never trained; returns step -> (raw parameters, averaged ones)."""
    fields = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "ffn_multiple_of": 32, "num_classes": 10}
    sample = SampleConfig(num_steps=5, cfg_scale=2.0)
    config = RunConfig(name="tiny", model=ModelConfig(**fields | model), sample=sample)
    checkpoints, data = CheckpointWriter(path, config.checkpoint), make_synthetic((8, 8, 4), 10).metadata
    saved = {}
    for step in steps:
        raw, averaged = (random_params(architecture(config.model), 2 * step + i) for i in range(2))
        rest = {"opt_state": {}, "skipped": {"total": jnp.int32(0)}, "spikes": {}, "window": {"sums": {}}}
        state = {"step": jnp.int32(step), "params": raw, "ema_params": averaged, **rest}
        checkpoints.save(state, describe_run(config, step, data))
        saved[step] = jax.tree.map(np.asarray, (raw, averaged))
    checkpoints.close()
    return saved


def assert_same_leaves(actual: Weights, expected: Weights) -> None:
    """The same leaves in the same order, bit for bit."""
    actual_leaves, expected_leaves = list(actual.leaves()), list(expected.leaves())
    assert [path for path, _ in actual_leaves] == [path for path, _ in expected_leaves]
    for (path, a), (_, e) in zip(actual_leaves, expected_leaves, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype), path
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes(), path
