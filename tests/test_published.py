"""A published state dict becomes our leaves and back without losing a bit; one that does not fit is named."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from terdit_jax.errors import UserError
from terdit_jax.interop.published import (
    StateDict,
    model_leaves,
    params_leaves,
    params_tree,
    published_layout,
    published_name,
    published_tensors,
    read_leaves,
)
from terdit_jax.model.transformer import abstract_params
from terdit_jax.parallel.sharding import path_name
from terdit_jax.ternary.packing import unpack, unpack_planes
from tests.deployed import VARIANTS, random_params, small_config
from tests.golden_models import GOLDEN, golden_config

WQ = "layers.1.attention.wq.weight"


@pytest.fixture
def master():
    """(model, tensors) with master weights in full precision."""
    return golden_config("train"), load_file(GOLDEN / "train_init.safetensors")


@pytest.fixture
def packed():
    """(model, tensors) with ternary weights in 2-bit planes."""
    return golden_config("terdit_tiny"), load_file(GOLDEN / "terdit_tiny.safetensors")


def read(model, tensors):
    return params_tree(read_leaves(model, StateDict.of(tensors)))


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (actual[key].shape, actual[key].dtype) == (tensor.shape, tensor.dtype), key
        assert np.asarray(actual[key]).tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize("name", ["train_init", "terdit_tiny", "terdit_tiny_noqk", "largedit_tiny"])
def test_there_and_back_is_the_same_bit_for_bit(name):
    model = golden_config("train" if name == "train_init" else name)
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    back = dict(published_tensors(model, read_leaves(model, StateDict.of(tensors))))
    assert_same(back, tensors)
    layout = published_layout(model, packed=name.startswith("terdit"))
    assert list(layout.items()) == [(key, (array.dtype, array.shape)) for key, array in back.items()]


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_model_goes_out_and_back(overrides):
    model = small_config(**overrides)
    params = random_params(model)
    tensors = dict(published_tensors(model, params_leaves(params)))
    assert {name: (array.dtype, array.shape) for name, array in tensors.items()} == published_layout(model, False)
    back = read(model, tensors)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_the_tree_is_the_models_own(master):
    model, tensors = master
    params, target = read(model, tensors), abstract_params(model)
    assert jax.tree.structure(params) == jax.tree.structure(target)
    for ours, expected in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True):
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)


def test_layers_lie_on_axis_0_under_their_own_numbers(master):
    model, tensors = master
    blocks = read(model, tensors)["blocks"]
    for i in range(model.depth):
        for ours, name in (
            (blocks["attention"]["wq"]["weight"], f"layers.{i}.attention.wq.weight"),
            (blocks["feed_forward"]["w3"]["weight"], f"layers.{i}.feed_forward.w3.weight"),
            (blocks["adaLN_modulation"]["norm"]["scale"], f"layers.{i}.adaLN_modulation.2.weight"),
        ):
            np.testing.assert_array_equal(ours[i], tensors[name], err_msg=name)
        assert blocks["feed_forward"]["w3"]["alpha"][i] == tensors[f"layers.{i}.feed_forward.w3.alphas"][0]
    assert np.any(blocks["attention"]["wq"]["weight"][0] != blocks["attention"]["wq"]["weight"][1])


def test_planes_become_packed_leaves_of_the_same_codes(packed):
    model, tensors = packed
    leaves = dict(read_leaves(model, StateDict.of(tensors)))
    ternary = [leaf for leaf in model_leaves(model) if leaf.ternary]
    assert len(ternary) == 8 and all(leaves[leaf.path].dtype == np.uint8 for leaf in ternary)
    for leaf in ternary:
        codes = np.stack([unpack_planes(tensors[name]) for name in leaf.names])
        np.testing.assert_array_equal(unpack(leaves[leaf.path]), codes, err_msg=leaf.path)


def test_nothing_is_read_before_it_is_asked_for(packed):
    model, tensors = packed
    been_read = []
    state_dict = StateDict(StateDict.of(tensors).layout, lambda name: been_read.append(name) or tensors[name])
    leaves = read_leaves(model, state_dict)
    assert not been_read
    for leaf in model_leaves(model):
        next(leaves)
        assert been_read[-len(leaf.names) :] == leaf.names, "a leaf reads its own tensors and no more"
    assert sorted(been_read) == sorted(tensors)


def test_full_precision_leaves_come_first(packed):
    ternary = [leaf.ternary for leaf in model_leaves(packed[0])]
    assert ternary == sorted(ternary) and any(ternary) and not all(ternary)


def test_other_float_dtypes_become_float32(master):
    model, tensors = master
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    params = read(model, halves)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(params["x_embedder"]["weight"], halves["x_embedder.weight"].astype(np.float32))


def test_scales_without_an_axis_are_read_too(master):
    model, tensors = master
    scalars = {name: tensor.reshape(()) if name.endswith(".alphas") else tensor for name, tensor in tensors.items()}
    jax.tree.map(np.testing.assert_array_equal, read(model, scalars), read(model, tensors))


@pytest.mark.parametrize("name", ["x_embedder.bias", WQ, "layers.0.attention.wk.alphas", "final_layer.linear.weight"])
def test_a_missing_tensor_is_named(master, name):
    model, tensors = master
    del tensors[name]
    with pytest.raises(UserError, match=f"lacks tensor '{name}'"):
        read(model, tensors)


@pytest.mark.parametrize("name", ["rope.freqs", "layers.2.ffn_norm.weight", "layers.0.attention.wq.bias"])
def test_an_unknown_tensor_is_named(master, name):
    model, tensors = master
    tensors[name] = np.zeros(64, np.float32)
    with pytest.raises(UserError, match=rf"'{name}' does not belong to this model \(1 such\)"):
        read(model, tensors)


def test_unknown_tensors_are_counted(master):
    model, tensors = master
    tensors |= {"b": np.zeros(1), "a": np.zeros(1)}
    with pytest.raises(UserError, match=r"'a' does not belong to this model \(2 such\)"):
        read(model, tensors)


@pytest.mark.parametrize(
    ("name", "shape", "needed"),
    [
        ("x_embedder.weight", (16, 64), (64, 16)),
        ("y_embedder.embedding_table.weight", (10, 64), (11, 64)),
        (WQ, (64, 32), (64, 64)),
        (WQ, (64 * 64,), (64, 64)),
        ("layers.0.attention.wk.alphas", (2,), (1,)),
        ("layers.1.adaLN_modulation.2.weight", (64,), (384,)),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(master, name, shape, needed):
    model, tensors = master
    tensors[name] = np.ones(shape, np.float32)
    with pytest.raises(UserError) as caught:
        read(model, tensors)
    assert str(caught.value) == f"checkpoint tensor {name!r} has shape {shape}, this model needs {needed}"


@pytest.mark.parametrize("shape", [(64, 64), (16, 32), (8, 64)])
def test_misshapen_planes_are_named(packed, shape):
    model, tensors = packed
    tensors[WQ] = np.zeros(shape, np.uint8)
    with pytest.raises(UserError, match=f"'{WQ}' has shape .* this model needs \\(16, 64\\)"):
        read(model, tensors)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"), [("x_embedder.weight", (64, 16), np.uint8), (WQ, (64, 64), np.int32)]
)
def test_a_dtype_that_the_model_cannot_use_is_named(packed, name, shape, dtype):
    model, tensors = packed
    tensors[name] = np.zeros(shape, dtype)
    with pytest.raises(UserError, match=f"'{name}' is {np.dtype(dtype)}, this model cannot use that"):
        read(model, tensors)


def test_planes_with_the_unused_code_are_refused(packed):
    model, tensors = packed
    tensors[WQ] = tensors[WQ].copy()
    tensors[WQ][3, 5] |= 0b00110000
    with pytest.raises(UserError, match=f"'{WQ}' holds the 2-bit code 11"):
        read(model, tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(master, value):
    model, tensors = master
    tensors[WQ] = tensors[WQ].copy()
    tensors[WQ][3, 5] = value
    with pytest.raises(UserError, match=f"'{WQ}' holds values that are not finite"):
        read(model, tensors)


def test_layers_of_which_some_are_packed_are_refused(packed):
    model, tensors = packed
    tensors[WQ] = unpack_planes(tensors[WQ]).astype(np.float32)
    with pytest.raises(UserError, match="packed in some layers and not in others"):
        read(model, tensors)


def test_a_full_precision_checkpoint_is_no_ternary_model(master):
    model, _ = master
    with pytest.raises(UserError, match="lacks tensor"):
        read(model, load_file(GOLDEN / "largedit_tiny.safetensors"))


def test_every_parameter_has_its_own_published_name(master):
    model, _ = master
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(model))]
    assert len({published_name(path) for path in paths}) == len(paths)
    with pytest.raises(ValueError, match="blocks/attention/w9/weight"):
        published_name("blocks/attention/w9/weight")
