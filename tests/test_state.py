"""A training state made from given weights: sharded, complete, and with the codes of those weights in its window."""

import jax
import numpy as np
import optax
import pytest

from terdit_jax.config_sections import MeshConfig
from terdit_jax.errors import UserError
from terdit_jax.interop.exports import export
from terdit_jax.interop.start import open_source
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.parallel.sharding import tree_shardings
from terdit_jax.training.state import make_state, packed_codes
from tests.deployed import random_weights, small_config
from tests.golden_models import BY_CHANNEL, random_params


def test_given_parameters_start_a_sharded_state():
    model, mesh = small_config(num_heads=4), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.tree.map(np.asarray, random_params(model))
    state = make_state(model, optax.adam(1e-3), mesh, 0, params)
    for name in ("params", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, state[name], params)
        assert jax.tree.map(lambda leaf: leaf.sharding, state[name]) == tree_shardings(params, mesh)
    assert int(state["step"]) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state["opt_state"]))
    jax.tree.map(np.testing.assert_array_equal, state["window"]["codes"], packed_codes(model, params))


@pytest.mark.parametrize("fields", [{}, BY_CHANNEL, {"threshold": 0.95}], ids=str)
def test_a_start_from_a_packed_file_ternarises_to_its_codes(tmp_path, fields):
    model = small_config(**fields)
    weights = random_weights(model)
    export(weights, tmp_path / "packed.safetensors", "packed")
    # Another size of picture and another dropout are another training of the same weights.
    model_to_start = small_config(input_size=16, class_dropout_prob=0.0, **fields)
    params = open_source(tmp_path / "packed.safetensors", model_to_start).params(0)
    expected = packed_codes(model, random_params(model))
    jax.tree.map(np.testing.assert_array_equal, packed_codes(model, params), expected)


def test_a_start_from_another_model_is_refused(tmp_path):
    export(random_weights(small_config()), tmp_path / "packed.safetensors", "packed")
    with pytest.raises(UserError, match="init_from=.*has depth=2, config.model has 3"):
        open_source(tmp_path / "packed.safetensors", small_config(depth=3))
    for field in ("gamma_per", "threshold"):
        with pytest.raises(UserError, match=f"has {field}=.*, config.model has {BY_CHANNEL[field]}"):
            open_source(tmp_path / "packed.safetensors", small_config(**{field: BY_CHANNEL[field]}))
    export(random_weights(small_config(alpha_per="channel")), tmp_path / "channel.safetensors", "packed")
    with pytest.raises(UserError, match="has alpha_per=channel, config.model has matrix"):
        open_source(tmp_path / "channel.safetensors", small_config())
