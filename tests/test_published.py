"""A published state dict becomes our leaves and back without losing a bit; one that does not fit is named."""

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from terdit_jax.errors import UserError
from terdit_jax.interop.published import (
    FLOATS,
    StateDict,
    model_leaves,
    params_leaves,
    params_tree,
    published_layout,
    published_name,
    published_tensors,
    read_leaves,
)
from terdit_jax.interop.weights import packed_leaves
from terdit_jax.ternary.packing import unpack, unpack_planes
from terdit_jax.ternary.quantize import absmean_codes
from tests.deployed import VARIANTS, random_params, small_config
from tests.golden_models import DIT, GOLDEN, golden_config, tiny_config

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
    assert ternary == list(model_leaves(model)[-8:]), "full-precision leaves come first"
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


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def with_value(value, dtype):
    array = np.ones((64, 64), dtype)
    array[3, 5] = value
    return array


ALPHA, NO_NUMBER = "layers.0.attention.wk.alphas", "holds values that are not finite, or beyond 2"
UNFIT = [  # tensors in the place of the golden ones, None for one that is missing, and what is said of them
    *(({name: None}, f"lacks tensor '{name}'") for name in ("x_embedder.bias", WQ, ALPHA, "final_layer.linear.weight")),
    *(
        ({name: ones(64)}, rf"'{name}' does not belong to this model \(1 such\)")
        for name in ("rope.freqs", "layers.2.ffn_norm.weight", "layers.0.attention.wq.bias")
    ),
    ({"b": ones(1), "a": ones(1)}, r"'a' does not belong to this model \(2 such\)"),
    ({"x_embedder.weight": ones(16, 64)}, r"shape \(16, 64\), this model needs \(64, 16\)"),
    ({"y_embedder.embedding_table.weight": ones(10, 64)}, r"shape \(10, 64\), this model needs \(11, 64\)"),
    *(({WQ: ones(*shape)}, r"this model needs \(64, 64\)") for shape in ((64, 32), (64 * 64,))),
    *(({WQ: ones(*shape, dtype=np.uint8)}, r"needs \(16, 64\)") for shape in ((64, 64), (16, 32), (8, 64))),
    ({ALPHA: ones(2)}, r"shape \(2,\), this model needs \(1,\)"),
    ({"layers.1.adaLN_modulation.2.weight": ones(64)}, r"this model needs \(384,\)"),
    ({"x_embedder.weight": ones(64, 16, dtype=np.uint8)}, "is uint8, this model cannot use that"),
    ({WQ: ones(64, 64, dtype=np.int32)}, "is int32, this model cannot use that"),
    ({WQ: np.full((16, 64), 0b00110000, np.uint8)}, f"'{WQ}' holds the 2-bit code 11"),
    ({WQ: ones(16, 64, dtype=np.uint8)}, "packed in some layers and not in others"),
    *(({WQ: with_value(np.nan, dtype)}, f"'{WQ}' {NO_NUMBER}") for dtype in FLOATS),
    *(({WQ: with_value(value, np.float32)}, NO_NUMBER) for value in (np.inf, -np.inf, 1e30)),
    ({WQ: with_value(1e300, np.float64)}, NO_NUMBER),
]


@pytest.mark.parametrize(("changed", "message"), UNFIT)
def test_tensors_that_do_not_fit_are_named(master, changed, message):
    model, tensors = master
    tensors = {name: array for name, array in (tensors | changed).items() if array is not None}
    with pytest.raises(UserError, match=message):
        read(model, tensors)


def test_a_full_precision_checkpoint_is_no_ternary_model(master):
    model, _ = master
    with pytest.raises(UserError, match="lacks tensor"):
        read(model, load_file(GOLDEN / "largedit_tiny.safetensors"))


@pytest.mark.parametrize("fields", [{}, DIT])
def test_every_parameter_has_its_own_published_name_or_part(fields):
    model = tiny_config(**fields)
    leaves = model_leaves(model)
    assert len({(leaf.name, leaf.part) for leaf in leaves}) == len(leaves)
    with pytest.raises(ValueError, match="blocks/attention/w9/weight"):
        published_name("blocks/attention/w9/weight", model.family)


def rounds_trip(model, tensors):
    leaves = list(read_leaves(model, StateDict.of(tensors)))
    written = dict(published_tensors(model, leaves))
    assert list(written) == list(published_layout(model, any(a.dtype == np.uint8 for a in tensors.values())))
    assert written.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
        assert (written[name].dtype, written[name].shape) == (array.dtype, array.shape)
    return leaves


@pytest.mark.parametrize("name", ["dit_tiny", "sit_tiny"])
def test_published_dit_is_written_back_bit_for_bit(name):
    rounds_trip(golden_config(name), load_file(GOLDEN / f"{name}.safetensors"))


@pytest.mark.parametrize("alpha_per", ["matrix", "channel"])
def test_ternary_dit_keeps_q_k_and_v_in_one_tensor_each_with_its_scale(alpha_per):
    model = tiny_config(**DIT, alpha_per=alpha_per)
    leaves = list(packed_leaves(model, params_leaves(random_params(model))))
    tensors = dict(published_tensors(model, sorted(leaves, key=lambda leaf: leaf[1].dtype == np.uint8)))
    assert tensors["blocks.1.attn.qkv.weight"].shape == (3 * 64 // 4, 64)
    params = random_params(model)["blocks"]["attention"]
    alphas = np.concatenate([np.ravel(params[name]["alpha"][1]) for name in ("wq", "wk", "wv")])
    assert len(alphas) == (3 if alpha_per == "matrix" else 3 * 64)
    np.testing.assert_array_equal(tensors["blocks.1.attn.qkv.alphas"], alphas)
    expected = [absmean_codes(params[name]["weight"][1]) for name in ("wq", "wk", "wv")]
    np.testing.assert_array_equal(unpack_planes(tensors["blocks.1.attn.qkv.weight"]), np.concatenate(expected))
    read = dict(read_leaves(model, StateDict.of(tensors)))
    for path, leaf in leaves:
        np.testing.assert_array_equal(read[path], leaf, err_msg=path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_dit_in_half_precision_is_read(dtype):
    tensors = {name: array.astype(dtype) for name, array in load_file(GOLDEN / "dit_tiny.safetensors").items()}
    leaves = dict(read_leaves(golden_config("dit_tiny"), StateDict.of(tensors)))
    qkv = tensors["blocks.1.attn.qkv.weight"].astype(np.float32)
    np.testing.assert_array_equal(leaves["blocks/attention/wk/weight"][1], qkv[64:128])


def test_another_table_of_positions_is_refused():
    tensors = load_file(GOLDEN / "dit_tiny.safetensors")
    tensors["pos_embed"] = tensors["pos_embed"] + np.float32(1e-3)
    with pytest.raises(UserError, match="'pos_embed' is not the fixed table of 2-D positions"):
        list(read_leaves(golden_config("dit_tiny"), StateDict.of(tensors)))
