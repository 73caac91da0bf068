"""A published state dict becomes our parameters and back without losing a bit; one that does not fit is named."""

from golden_models import GOLDEN, golden_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from terdit_jax.errors import UserError
from terdit_jax.interop.published import params_from_published, published_name, published_tensors
from terdit_jax.model.transformer import abstract_params
from terdit_jax.parallel.sharding import path_name
from terdit_jax.ternary.packing import pack_planes
from terdit_jax.ternary.quantize import absmean_codes

WQ = "layers.1.attention.wq.weight"


@pytest.fixture
def master():
    """(model, tensors) with master weights in full precision."""
    return golden_config("train"), load_file(GOLDEN / "train_init.safetensors")


@pytest.fixture
def packed():
    """(model, tensors) with ternary weights in 2-bit planes."""
    return golden_config("terdit_tiny"), load_file(GOLDEN / "terdit_tiny.safetensors")


@pytest.mark.parametrize("name", ["train_init", "largedit_tiny"])
def test_there_and_back_is_the_same_bit_for_bit(name):
    model = golden_config("train" if name == "train_init" else name)
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    back = dict(published_tensors(model, params_from_published(model, tensors)))
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (back[key].shape, back[key].dtype) == (tensor.shape, tensor.dtype), key
        assert back[key].tobytes() == tensor.tobytes(), key


def test_the_tree_is_the_models_own(master):
    model, tensors = master
    params = params_from_published(model, tensors)
    target = abstract_params(model)
    assert jax.tree.structure(params) == jax.tree.structure(target)
    for ours, expected in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True):
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)


def test_layers_lie_on_axis_0_under_their_own_numbers(master):
    model, tensors = master
    blocks = params_from_published(model, tensors)["blocks"]
    for i in range(model.depth):
        for ours, name in (
            (blocks["attention"]["wq"]["weight"], f"layers.{i}.attention.wq.weight"),
            (blocks["feed_forward"]["w3"]["weight"], f"layers.{i}.feed_forward.w3.weight"),
            (blocks["adaLN_modulation"]["norm"]["scale"], f"layers.{i}.adaLN_modulation.2.weight"),
        ):
            np.testing.assert_array_equal(ours[i], tensors[name], err_msg=name)
        assert blocks["feed_forward"]["w3"]["alpha"][i] == tensors[f"layers.{i}.feed_forward.w3.alphas"][0]
    assert np.any(blocks["attention"]["wq"]["weight"][0] != blocks["attention"]["wq"]["weight"][1])


def test_packed_planes_become_codes_that_pack_to_the_same_planes(packed):
    model, tensors = packed
    planes = [name for name, tensor in tensors.items() if tensor.dtype == np.uint8]
    assert len(planes) == 8 * model.depth
    back = dict(published_tensors(model, params_from_published(model, tensors)))
    codes_of = jax.jit(absmean_codes)
    for name in planes:
        assert set(np.unique(back[name])) <= {-1, 0, 1}
        codes = np.asarray(codes_of(jnp.asarray(back[name])[None])[0], np.int8)
        np.testing.assert_array_equal(codes, back[name], err_msg="ternarising the codes gives them again")
        np.testing.assert_array_equal(pack_planes(codes), tensors[name])


def test_other_float_dtypes_become_float32(master):
    model, tensors = master
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    params = params_from_published(model, halves)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(params["x_embedder"]["weight"], halves["x_embedder.weight"].astype(np.float32))


@pytest.mark.parametrize("name", ["x_embedder.bias", WQ, "layers.0.attention.wk.alphas", "final_layer.linear.weight"])
def test_a_missing_tensor_is_named(master, name):
    model, tensors = master
    del tensors[name]
    with pytest.raises(UserError, match=f"lacks tensor '{name}'"):
        params_from_published(model, tensors)


@pytest.mark.parametrize("name", ["rope.freqs", "layers.2.ffn_norm.weight", "layers.0.attention.wq.bias"])
def test_an_unknown_tensor_is_named(master, name):
    model, tensors = master
    tensors[name] = np.zeros(64, np.float32)
    with pytest.raises(UserError, match=rf"'{name}' does not belong to this model \(1 such\)"):
        params_from_published(model, tensors)


def test_unknown_tensors_are_counted(master):
    model, tensors = master
    tensors |= {"b": np.zeros(1), "a": np.zeros(1)}
    with pytest.raises(UserError, match=r"'a' does not belong to this model \(2 such\)"):
        params_from_published(model, tensors)


@pytest.mark.parametrize(
    ("name", "shape", "needed"),
    [
        ("x_embedder.weight", (16, 64), (64, 16)),
        ("y_embedder.embedding_table.weight", (10, 64), (11, 64)),
        (WQ, (64, 32), (64, 64)),
        (WQ, (64 * 64,), (64, 64)),
        ("layers.0.attention.wk.alphas", (2,), ()),
        ("layers.1.adaLN_modulation.2.weight", (64,), (384,)),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(master, name, shape, needed):
    model, tensors = master
    tensors[name] = np.ones(shape, np.float32)
    with pytest.raises(UserError) as caught:
        params_from_published(model, tensors)
    assert str(caught.value) == f"checkpoint tensor {name!r} has shape {shape}, this model needs {needed}"


@pytest.mark.parametrize("shape", [(64, 64), (16, 32), (8, 64)])
def test_misshapen_planes_are_named(packed, shape):
    model, tensors = packed
    tensors[WQ] = np.zeros(shape, np.uint8)
    with pytest.raises(UserError, match=f"'{WQ}' has shape .* this model needs \\(64, 64\\)"):
        params_from_published(model, tensors)


def test_planes_are_refused_where_the_model_has_no_ternary_map(packed):
    model, tensors = packed
    tensors["x_embedder.weight"] = np.zeros((16, 16), np.uint8)
    with pytest.raises(UserError, match="'x_embedder.weight' has shape"):
        params_from_published(model, tensors)


def test_planes_with_the_unused_code_are_refused(packed):
    model, tensors = packed
    tensors[WQ] = np.full_like(tensors[WQ], 0b11111111)
    with pytest.raises(UserError, match=WQ):
        params_from_published(model, tensors)


def test_a_full_precision_checkpoint_is_no_ternary_model(master):
    model, _ = master
    with pytest.raises(UserError, match="lacks tensor"):
        params_from_published(model, load_file(GOLDEN / "largedit_tiny.safetensors"))


def test_every_parameter_has_its_own_published_name(master):
    model, _ = master
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(model))]
    assert len({published_name(path) for path in paths}) == len(paths)
    with pytest.raises(ValueError, match="blocks/attention/w9/weight"):
        published_name("blocks/attention/w9/weight")
