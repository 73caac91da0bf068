"""Whatever a path holds is opened as what it is, the right file of several, and says in one line why it cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from terdit_jax.errors import UserError
from terdit_jax.interop.exports import export
from terdit_jax.interop.published import model_leaves, params_leaves, params_tree, published_tensors
from terdit_jax.interop.weights import MODEL_ARGS, consolidated_name, master_params, open_weights, packed_leaves
from terdit_jax.ternary.packing import pack, unpack
from terdit_jax.ternary.quantize import absmean_codes
from tests.deployed import (
    assert_same_leaves,
    golden_weights,
    make_workdir,
    random_params,
    random_weights,
    small_config,
    weights_of,
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """(path, step -> (raw, averaged) parameters)"""
    path = tmp_path_factory.mktemp("run")
    return path, make_workdir(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of all four consolidated files, with weights that tell which is which."""
    pytest.importorskip("torch")
    place = tmp_path_factory.mktemp("folder")
    for ema in (True, False):
        weights = weights_of(small_config(), random_params(small_config(), ema), ema=ema)
        for masters in (True, False):
            export(weights, place / "one", "torch", masters=masters)
            for file in (place / "one").iterdir():
                file.rename(place / file.name)
            (place / "one").rmdir()
    return place


def tree_of(weights):
    return params_tree(weights.leaves())


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize(("step", "found"), [(None, 2), (1, 1)])
def test_a_workdir_gives_its_raw_or_averaged_weights_of_a_step(workdir, ema, step, found):
    path, saved = workdir
    weights = open_weights(path, ema=ema, step=step)
    description = weights.description
    assert (description.name, description.step, description.ema, weights.masters) == ("tiny", found, ema, True)
    assert description.sample.num_steps == 5 and weights.model == description.model
    tree = tree_of(weights)
    jax.tree.map(np.testing.assert_array_equal, tree, saved[found][ema])
    assert [path for path, _ in weights.leaves()] == [leaf.path for leaf in model_leaves(weights.model)]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {"step": 3}, "step 3 was asked for, but .* is no workdir"),
        ([], {}, "neither a run's checkpoints/ nor consolidated_ema_ternary.* nor consolidated_ema.*is nothing"),
        (["b.txt", "a.txt"], {}, "nor consolidated_ema.00-of-01.pth: there is a.txt, b.txt"),
        (
            ["consolidated_ema_ternary.00-of-01.pth"], {"ema": False},
            "consolidated_ternary.00-of-01.pth nor consolidated.00-of-01.pth: there is consolidated_ema",
        ),
        (
            [f"consolidated_ema.{i:02}-of-02.pth" for i in range(2)], {},
            r"several parts \(consolidated_ema.01-of-02.pth\): only 00-of-01",
        ),
    ],
)  # fmt: skip
def test_a_folder_of_something_else_says_what_it_holds(tmp_path, names, options, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path, **options)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_file_of_something_else_is_one_line(tmp_path, name):
    (tmp_path / name).write_text("not a model")
    with pytest.raises(UserError, match=name) as caught:
        open_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("masters", [True, False])
def test_a_folder_gives_the_file_asked_for(folder, ema, masters):
    weights = open_weights(folder, ema=ema, masters=masters)
    assert weights.source == str(folder / consolidated_name(ema, not masters))
    assert (weights.masters, weights.description.ema) == (masters, ema)
    assert_same_leaves(open_weights(weights.source), weights)
    params = random_params(small_config(), ema)
    expected = params_leaves(params) if masters else packed_leaves(small_config(), params_leaves(params))
    jax.tree.map(np.testing.assert_array_equal, tree_of(weights), params_tree(expected))


def test_a_folder_gives_what_it_has(folder, tmp_path):
    for masters in (True, False):
        place = tmp_path / str(masters)
        place.mkdir()
        for name in (consolidated_name(True, ternary=not masters), MODEL_ARGS):
            (place / name).write_bytes((folder / name).read_bytes())
        assert open_weights(place, masters=not masters).masters == masters


def test_a_file_without_model_args_must_have_a_published_shape(folder, tmp_path):
    name = consolidated_name(True, True)
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match=f"{name}: width 32 with 2 layers is none of the published models"):
        open_weights(tmp_path)


def test_model_args_of_another_model_are_refused(folder, tmp_path):
    export(random_weights(small_config(qk_norm=False)), tmp_path / "other", "torch")
    name = consolidated_name(True, True)
    (tmp_path / "other" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="describes a model with qk_norm=False, its tensors have True"):
        open_weights(tmp_path / "other")


def test_safetensors_of_other_software_are_taken_for_a_published_model(tmp_path):
    name = "model.safetensors"
    tensors = dict(published_tensors(small_config(), random_weights(small_config()).leaves()))
    save_file({key: np.array(tensor) for key, tensor in tensors.items()}, tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: width 32 with 2 layers is none of the published models"):
        open_weights(tmp_path / name)


def test_ternarising_is_the_quantisers_and_leaves_the_rest_alone():
    model = small_config(num_kv_heads=1)
    params = random_params(model)
    packed = dict(packed_leaves(model, params_leaves(params)))
    codes_of = jax.jit(lambda w: pack(absmean_codes(w)))
    for leaf in model_leaves(model):
        original = dict(params_leaves(params))[leaf.path]
        expected = codes_of(original) if leaf.ternary else original
        assert packed[leaf.path].dtype == expected.dtype
        np.testing.assert_array_equal(packed[leaf.path], expected, err_msg=leaf.path)
    again = dict(packed_leaves(model, packed.items()))
    assert all(again[path] is array for path, array in packed.items()), "what is packed already stays as it is"


def test_master_weights_come_back_bit_for_bit():
    params = random_params(small_config())
    jax.tree.map(np.testing.assert_array_equal, master_params(small_config(), params_leaves(params)), params)


def test_codes_become_master_weights_of_a_fresh_ones_size():
    """Ternarised they are the same codes; their mean size is a xavier-uniform matrix's, so rates fit them as well."""
    weights = golden_weights("terdit_tiny")
    leaves = dict(weights.leaves())
    params = dict(params_leaves(master_params(weights.model, leaves.items())))
    codes_of = jax.jit(jax.vmap(absmean_codes))
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
