"""Training keeps some of another model's weights and begins others afresh; how near it then starts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from terdit_jax.config_sections import DiffusionConfig
from terdit_jax.diffusion.objective import make_objective
from terdit_jax.errors import UserError
from terdit_jax.interop.exports import export
from terdit_jax.interop.published import model_leaves, params_leaves, params_tree
from terdit_jax.interop.start import master_params, open_source, ternarised_params
from terdit_jax.interop.weights import packed_leaves
from terdit_jax.model.embedders import condition
from terdit_jax.model.transformer import abstract_params, forward, init_params, make_operands
from terdit_jax.reproducible import make_key
from terdit_jax.ternary.packing import unpack
from terdit_jax.ternary.quantize import PUBLISHED, Rounding, absmean_codes
from terdit_jax.training.examples import example_keys
from tests.deployed import golden_weights, random_params, random_weights, small_config, weights_of
from tests.golden_models import BY_CHANNEL, DIT, GOLDEN, golden_config
from tests.torch_files import save_tensors

DDPM = make_objective(DiffusionConfig(), True)
FULL = small_config(ternary=False)


@pytest.fixture(params=["ddpm", "flow"])
def objective(request):
    return make_objective(DiffusionConfig(request.param), True)


def full_precision(config, seed=0):
    return jax.tree.map(np.array, random_params(dataclasses.replace(config, ternary=False), seed))


def saved(path, model, params=None):
    """A file of masters, or of a random model."""
    weights = random_weights(model) if params is None else weights_of(model, params)
    export(weights, path, "safetensors", masters=True)
    return path


def test_master_weights_come_back_bit_for_bit():
    params = random_params(small_config())
    jax.tree.map(np.testing.assert_array_equal, master_params(small_config(), params_leaves(params)), params)


@pytest.mark.parametrize("rounding", [PUBLISHED, Rounding("channel", 0.95)], ids=["published", "channel"])
def test_codes_become_master_weights_of_a_fresh_ones_size(rounding):
    """Ternarised they are the same codes; their mean size is that of a xavier-uniform matrix, so rates fit as well."""
    weights = golden_weights("terdit_tiny")
    leaves = dict(weights.leaves())
    params = dict(params_leaves(master_params(weights.model, leaves.items())))
    codes_of = jax.jit(jax.vmap(partial(absmean_codes, rounding=rounding)))
    for leaf in model_leaves(weights.model):
        if not leaf.ternary:
            np.testing.assert_array_equal(params[leaf.path], leaves[leaf.path])
            continue
        masters, codes = params[leaf.path], np.asarray(unpack(jnp.asarray(leaves[leaf.path])))
        assert masters.dtype == np.float32 and masters.shape == leaf.shape
        np.testing.assert_array_equal(codes_of(masters), codes, err_msg=leaf.path)
        bound = np.sqrt(6 / sum(leaf.tensor_shape))  # xavier-uniform draws from [-bound, bound]
        np.testing.assert_allclose(np.abs(masters).mean(axis=(1, 2)), bound / 2, rtol=1e-5)


def test_a_matrix_of_nothing_but_zeros_stays_finite():
    model = small_config()
    leaves = {path: array.copy() for path, array in packed_leaves(model, params_leaves(random_params(model)))}
    path = "blocks/attention/wq/weight"
    leaves[path][0] = 0b01010101
    masters = dict(params_leaves(master_params(model, leaves.items())))[path]
    assert not masters[0].any() and np.isfinite(masters).all() and masters[1].any()


VARIANTS = {
    "TerDiT": {},
    "without the norm": {"adaln_rms_norm": False},
    "grouped heads": {"num_kv_heads": 1},
    "DiT": DIT,
    "scales of outputs": BY_CHANNEL,
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_full_precision_becomes_ternary_by_least_squares_and_keeps_the_rest(objective, fields):
    model = small_config(**fields)
    params = full_precision(model)
    start = ternarised_params(model, model.num_classes, objective, params)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, abstract_params(model))
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {np.dtype(np.float32)}
    kept, leaves = dict(params_leaves(params)), dict(params_leaves(start))
    for path, leaf in leaves.items():
        if path in kept:
            np.testing.assert_array_equal(leaf, kept[path], err_msg=path)
        elif path.endswith("alpha"):
            weight = np.float64(kept[path.removesuffix("alpha") + "weight"])
            codes = np.asarray(absmean_codes(jnp.asarray(weight, jnp.float32), model.rounding), np.float64)
            shared = (2,) if model.alpha_per == "channel" else (1, 2)
            expected = (weight * codes).sum(shared) / np.square(codes).sum(shared)
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, err_msg=path)
        else:
            assert path == "blocks/adaLN_modulation/norm/scale"
            np.testing.assert_allclose(leaf, gains_of(model, objective, params, leaves), rtol=2e-3, atol=1e-4)


def gains_of(model, objective, params, leaves):
    """In float64, each by a solver of least squares."""
    places = np.arange(1024)
    t = jax.vmap(objective.draw_t)(example_keys(0, 0, places))
    c = np.float64(condition(params, t, places % (model.num_classes + 1)))
    adaln, gains = params["blocks"]["adaLN_modulation"], []
    for layer in range(model.depth):
        weight, bias = np.float64(adaln["weight"][layer]), np.float64(adaln["bias"][layer])
        codes = np.asarray(absmean_codes(adaln["weight"][layer], model.rounding), np.float64)
        out = c @ (np.reshape(leaves["blocks/adaLN_modulation/alpha"][layer], (-1, 1)) * codes).T + bias
        normed, wanted = out / np.sqrt(np.square(out).mean(1, keepdims=True) + 1e-5), c @ weight.T + bias
        gains.append(
            [np.linalg.lstsq(n[:, None], m, rcond=None)[0][0] for n, m in zip(normed.T, wanted.T, strict=True)]
        )
    return np.array(gains)


@pytest.mark.parametrize("fields", [{}, DIT, DIT | BY_CHANNEL], ids=["TerDiT", "DiT", "scales of outputs"])
def test_a_model_that_ternary_weights_can_equal_starts_as_its_equal(fields):
    """Three values a matrix, and a modulation of the same length for every condition: the norm takes that length from
    it and the gain gives it back."""
    model = small_config(**fields)
    params, generator = full_precision(model), np.random.default_rng(1)
    three_values = lambda leaf: np.float32(0.2) * generator.integers(-1, 2, leaf.shape).astype(np.float32)  # noqa: E731
    params = params_tree(
        (path, three_values(leaf) if path.startswith("blocks/") and path.endswith("/weight") else leaf)
        for path, leaf in params_leaves(params)
    )
    params["blocks"]["adaLN_modulation"]["weight"] *= 0
    start = ternarised_params(model, model.num_classes, DDPM, params)
    x_t = generator.standard_normal((3, *model.sample_shape), np.float32)
    t, y = jnp.array([3, 500, 999]), jnp.array([0, 4, model.num_classes])
    run = jax.jit(lambda config, params: forward(config, make_operands(config, params), x_t, t, y), static_argnums=0)
    outputs = run(dataclasses.replace(model, ternary=False), params), run(model, start)
    np.testing.assert_allclose(*outputs, atol=2e-5 * np.abs(outputs[0]).max())


@pytest.mark.parametrize("fields", [{}, DIT], ids=["TerDiT", "DiT"])
def test_the_alpha_of_a_matrix_becomes_that_of_each_output(tmp_path, fields):
    model = small_config(**fields)
    path, channel = saved(tmp_path / "a.safetensors", model), dataclasses.replace(model, alpha_per="channel")
    params = open_source(path, channel).params(0)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params(channel))
    for name, leaf in params_leaves(open_source(path, model).params(0)):
        spread = dict(params_leaves(params))[name]
        np.testing.assert_array_equal(spread, leaf[:, None] + np.zeros_like(spread) if "/alpha" in name else leaf)


def test_a_start_that_has_learned_no_modulation_has_a_fresh_norm():
    model = small_config()
    params = full_precision(model)
    for name in ("weight", "bias"):
        params["blocks"]["adaLN_modulation"][name] *= 0
    start = ternarised_params(model, model.num_classes, DDPM, params)
    assert (start["blocks"]["adaLN_modulation"]["norm"]["scale"] == 1).all()


@pytest.mark.parametrize("source", [FULL, small_config()], ids=["from full precision", "from ternary"])
@pytest.mark.parametrize(("num_classes", "keep"), [(3, True), (10, False)])
def test_other_classes_begin_as_in_a_fresh_run_and_the_null_class_stays(tmp_path, source, num_classes, keep):
    path, model = saved(tmp_path / "a.safetensors", source), small_config(num_classes=num_classes)
    opened = open_source(path, model, keep_labels=keep)
    assert f"the label table of {num_classes} classes, but for the null class" in str(opened)
    params = opened.params(seed=7)
    table, old = params["y_embedder"]["embedding_table"], random_params(source)["y_embedder"]["embedding_table"]
    fresh = init_params(model, make_key(7))["y_embedder"]["embedding_table"]
    np.testing.assert_allclose(table[:-1], fresh[:-1], rtol=1e-6)  # which is not compiled as one program
    np.testing.assert_array_equal(table[-1], old[-1])
    kept = random_params(source)["blocks"]["attention"]["wq"]["weight"]
    np.testing.assert_array_equal(params["blocks"]["attention"]["wq"]["weight"], kept)
    same = open_source(path, small_config(num_classes=10)).params(seed=7)["y_embedder"]["embedding_table"]
    np.testing.assert_array_equal(same, old)


def test_other_classes_begin_afresh_in_a_packed_file_too(tmp_path):
    export(random_weights(small_config()), tmp_path / "a.safetensors", "packed")
    model = small_config(num_classes=12)
    params = open_source(tmp_path / "a.safetensors", model).params(0)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params(model))


def test_a_line_says_what_begins_afresh(tmp_path):
    path = saved(tmp_path / "a.safetensors", FULL)
    for model, afresh in (
        (FULL, "nothing"),
        (small_config(adaln_rms_norm=False), "alpha, by least squares"),
        (small_config(), "alpha, by least squares; the gain after adaLN, by least squares"),
        (dataclasses.replace(FULL, num_classes=2), "the label table of 2 classes, but for the null class"),
    ):
        line = f"weights from {path}, step 7, averaged; begun afresh: {afresh}"
        assert str(open_source(path, model)) == line
    export(random_weights(small_config()), tmp_path / "packed.safetensors", "packed")
    assert str(open_source(tmp_path / "packed.safetensors", small_config())).endswith(": master weights, of the codes")


@pytest.mark.parametrize(
    ("source", "fields", "message"),
    [
        ({}, {"ternary": False}, "ternary=True, config.model has False"),
        ({}, {"adaln_rms_norm": False}, "adaln_rms_norm=True, config.model has False"),
        ({"ternary": False}, {"depth": 3}, "depth=2, config.model has 3"),
        ({"ternary": False}, {"qk_norm": False}, "qk_norm=True, config.model has False"),
        ({"ternary": False}, {**DIT}, "family=large_dit, config.model has dit"),
        ({"ternary": False}, {"num_kv_heads": 1}, "num_kv_heads=2, config.model has 1"),
        ({"ternary": False}, {"hidden_size": 64}, "hidden_size=32, config.model has 64"),
    ],
)
def test_what_remains_another_model_is_refused(tmp_path, source, fields, message):
    path = saved(tmp_path / "a.safetensors", small_config(**source))
    with pytest.raises(UserError, match=f"config.train.init_from={path} has {message}") as caught:
        open_source(path, small_config(**fields))
    assert "\n" not in str(caught.value)


@pytest.fixture
def dit():
    """The tensors of a DiT of no published size, with four heads."""
    return load_file(GOLDEN / "dit_tiny.safetensors")


@pytest.mark.parametrize("name", ["DiT-XL-2.safetensors", "SiT-XL-2.safetensors", "other.safetensors"])
def test_a_training_starts_from_a_dit_whatever_it_predicted(tmp_path, dit, name):
    """Heads are the run's own where the file does not tell, and so is adaLN's norm, which only ternary models have."""
    path, model = save_tensors(dit, tmp_path / name), golden_config("dit_tiny")
    expected = params_tree(golden_weights("dit_tiny").leaves())
    jax.tree.map(np.testing.assert_array_equal, open_source(path, model).params(0), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learn_sigma": False}, "learn_sigma=True, config.model has False"),
        ({"depth": 3}, "depth=2, config.model has 3"),
        ({"patch_size": 4}, "patch_size=2, config.model has 4"),
    ],
)
def test_a_training_starts_from_no_other_dit(tmp_path, dit, fields, message):
    path = save_tensors(dit, tmp_path / "DiT-XL-2.safetensors")
    model = small_config(**{"ternary": False, "hidden_size": 64, "num_heads": 4, **DIT, **fields})
    with pytest.raises(UserError, match=f"config.train.init_from={path} has {message}"):
        open_source(path, model)


def test_a_training_of_one_family_starts_from_no_other(tmp_path, dit):
    path = save_tensors(dit, tmp_path / "DiT-XL-2.safetensors")
    model = small_config(ternary=False, hidden_size=64)
    with pytest.raises(UserError, match="has family='?dit'?, config.model has '?large_dit'?"):
        open_source(path, model)


def test_a_training_at_another_image_size_starts_from_a_dit(tmp_path, dit):
    """The table of positions is no parameter."""
    path = save_tensors(dit, tmp_path / "DiT-XL-2.safetensors")
    model = small_config(ternary=False, hidden_size=64, num_heads=4, input_size=16, **DIT)
    assert open_source(path, model).weights.masters
