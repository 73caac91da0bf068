"""A folder as diffusers writes it becomes the autoencoder's parameters; one that does not fit is named in a line."""

import dataclasses
import hashlib
import json
from pathlib import Path
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from terdit_jax.errors import UserError
from terdit_jax.interop.vae_weights import CONFIG, SAFETENSORS, TORCH, load_vae, parse_config, vae_identity
from terdit_jax.model.vae import VAEConfig, abstract_params
from tests.golden_models import GOLDEN
from tests.torch_files import save_state_dict

TINY = GOLDEN / "vae_tiny"
NAME = "stabilityai/sd-vae-ft-ema"
QUERY, PROJECTION = "encoder.mid_block.attentions.0.to_q.weight", "decoder.mid_block.attentions.0.to_out.0.weight"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# Of stabilityai/sd-vae-ft-mse.
PUBLISHED = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny autoencoder's folder that a test may spoil."""
    for name in (CONFIG, SAFETENSORS):
        shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def tensors():
    return load_file(TINY / SAFETENSORS)


def assert_refused(path, message):
    with pytest.raises(UserError, match=message) as raised:
        load_vae(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def renamed(tensors, convolutions, older=True):
    """Names that diffusers once gave them if `older`; the attention's maps as 1x1 convolutions or matrices."""
    return {
        re.sub(r"to_q|to_k|to_v|to_out\.0", lambda match: OLD[match[0]] if older else match[0], name): (
            array[:, :, None, None] if convolutions and array.ndim == 2 else array
        )
        for name, array in tensors.items()
    }


def test_the_tree_is_the_models_own(tensors):
    config, params = load_vae(TINY)
    assert config == VAEConfig(block_out_channels=(32, 64, 64, 64), sample_size=64)
    target = abstract_params(config)
    assert jax.tree.structure(params) == jax.tree.structure(target)
    for ours, expected in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True):
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    kernel = params["encoder"]["down_blocks"]["1"]["resnets"]["0"]["conv1"]["weight"]
    np.testing.assert_array_equal(
        kernel[7, 0, 2, 5], tensors["encoder.down_blocks.1.resnets.0.conv1.weight"][7, 5, 0, 2]
    )
    np.testing.assert_array_equal(params["encoder"]["mid_block"]["attentions"]["0"]["to_q"]["weight"], tensors[QUERY])


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("convolutions", [False, True])
def test_todays_and_older_names_and_shapes_are_the_same_weights(folder, tensors, older, convolutions):
    save_file(renamed(tensors, convolutions, older), folder / SAFETENSORS)
    assert_same(load_vae(folder), load_vae(TINY))


def test_pytorch_files_are_read_where_there_is_nothing_else(folder, tensors):
    (folder / SAFETENSORS).unlink()
    save_state_dict(tensors, folder / TORCH)
    assert_same(load_vae(folder), load_vae(TINY))


def test_half_precision_becomes_float32(folder, tensors):
    save_file({name: array.astype(np.float16) for name, array in tensors.items()}, folder / SAFETENSORS)
    params = load_vae(folder)[1]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(params["quant_conv"]["bias"], tensors["quant_conv.bias"].astype(np.float16))


def test_the_published_configuration_is_understood():
    assert parse_config(PUBLISHED, "config.json") == VAEConfig()
    newer = {"force_upcast": True, "shift_factor": None, "use_quant_conv": True, "scaling_factor": 0.13025}
    assert parse_config(PUBLISHED | newer, "config.json") == VAEConfig(scaling_factor=0.13025)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_class_name", "AutoencoderTiny"),
        ("act_fn", "relu"),
        ("act_fn", None),
        ("use_quant_conv", False),
        ("use_post_quant_conv", False),
        ("use_quant_conv", 1),
        ("mid_block_add_attention", False),
        ("shift_factor", 0.1),
        ("latents_mean", [0.0] * 4),
        ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        ("down_block_types", ["DownEncoderBlock2D"] * 3),
        ("up_block_types", "UpDecoderBlock2D"),
        ("up_block_types", None),
        ("block_out_channels", []),
        ("block_out_channels", [128, 256, 512, 500]),
        ("block_out_channels", [128, 256, 512, 0]),
        ("block_out_channels", [128, 256, 512, 512.0]),
        ("block_out_channels", [32] * 9),
        ("block_out_channels", "128"),
        ("block_out_channels", [[[[[[[[[[1]]]]]]]]]] * 4),
        ("layers_per_block", 1 << 20),
        ("layers_per_block", True),
        ("latent_channels", -4),
        ("latent_channels", "4"),
        ("in_channels", None),
        ("norm_num_groups", 48),
        ("sample_size", 256.0),
        ("scaling_factor", 0),
        ("scaling_factor", "0.18215"),
        ("time_compression\nratio", 4),
        ("out_channels", 10**400),
    ],
)
def test_another_architecture_is_named(folder, name, value):
    (folder / CONFIG).write_text(json.dumps(PUBLISHED | {name: value}))
    known = "norm_num_groups" if value == [128, 256, 512, 500] else re.escape(repr(name)[1:-1])
    assert_refused(folder, f"config.json: .*{known}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not sound JSON"),
        (b"[]", "not a JSON dict"),
        (b'{"scaling_factor": NaN}', "config.json.*NaN"),
        (b" " * 70_000, "larger than 65536 bytes"),
    ],
)
def test_a_configuration_that_is_none(folder, content, message):
    (folder / CONFIG).write_bytes(content)
    assert_refused(folder, message)


def test_files_that_are_not_there(folder):
    assert_refused(folder / "elsewhere", "is no folder")
    assert_refused(folder / CONFIG, "is no folder")
    (folder / SAFETENSORS).unlink()
    assert_refused(folder, f"has neither {SAFETENSORS} nor {TORCH}")
    (folder / CONFIG).unlink()
    assert_refused(folder, "cannot read .*config.json: No such file")


def of_shape(name, *shape):
    return lambda tensors: {name: tensors[name].reshape(shape)}


def with_value(value):
    def spoil(tensors):
        spoiled = tensors[PROJECTION].astype(np.float64)
        spoiled[3, 4] = value
        return {PROJECTION: spoiled}

    return spoil


UNFIT = [  # tensors in the place of sound ones, None for one that is missing, and what is said of them
    *((lambda _, n=name: {n: None}, f"lacks tensor '{name}'") for name in (QUERY, "quant_conv.weight")),
    *(
        (lambda _, n=name: {n: np.zeros(1, np.float32)}, f"tensor {re.escape(repr(name[:60]))} does not belong")
        for name in ("encoder.conv_in.scale", "model.quant_conv.bias", "decoder.up_blocks.0.query.weight", "x" * 1000)
    ),
    (lambda _: {"a\nb": np.zeros(1)}, re.escape(r"tensor 'a\nb' does not belong")),
    (lambda tensors: {QUERY.replace("to_q", "query"): tensors[QUERY]}, "are the same parameter"),
    (of_shape("encoder.conv_in.weight", 3, 3, 3, 32), r"'encoder.conv_in.weight' has shape \(3, 3, 3, 32\)"),
    (of_shape("encoder.conv_in.bias", 32, 1), r"'encoder.conv_in.bias' has shape \(32, 1\)"),
    (of_shape(QUERY, 32, 128), r"to_q.weight' has shape \(32, 128\)"),
    (of_shape(PROJECTION, 1, 1, 64, 64), r"to_out.0.weight' has shape \(1, 1, 64, 64\)"),
    (of_shape("quant_conv.weight", 8, 8), r"'quant_conv.weight' has shape \(8, 8\)"),
    *((with_value(value), "holds values that are not finite") for value in (np.nan, np.inf, -np.inf, 1e300)),
    (lambda tensors: {QUERY: tensors[QUERY].astype(np.int8)}, "holds int8"),
]


@pytest.mark.parametrize(("change", "message"), UNFIT)
def test_tensors_that_do_not_fit_are_named(folder, tensors, change, message):
    changed = tensors | change(tensors)
    save_file({name: array for name, array in changed.items() if array is not None}, folder / SAFETENSORS)
    assert_refused(folder, message)


@pytest.mark.parametrize("name", [SAFETENSORS, TORCH])
def test_files_of_something_else(folder, name):
    (folder / SAFETENSORS).unlink()
    (folder / name).write_bytes(b"PK\x03\x04 not a zip")
    assert_refused(folder, name)


@pytest.fixture
def published(hub):
    """The autoencoder's folder on the Hub."""
    return Path(shutil.copytree(TINY, hub.folder / NAME))


def asked(hub):
    return [(repository, file) for repository, file, _ in hub.asked]


@pytest.mark.parametrize("end", ["", "@main", "/"])
def test_a_name_is_fetched(hub, published, end):
    assert_same(load_vae(f"{NAME}{end}"), load_vae(TINY))
    assert asked(hub) == [(NAME, CONFIG), (NAME, SAFETENSORS)]


def test_a_name_without_safetensors_is_fetched(hub, published, tensors):
    (published / SAFETENSORS).unlink()
    save_state_dict(tensors, published / TORCH)
    assert_same(load_vae(NAME), load_vae(TINY))
    assert asked(hub) == [(NAME, CONFIG), (NAME, TORCH)]


def test_a_folder_of_a_repository_is_fetched(hub, published):
    shutil.copytree(TINY, published / "vae")
    assert_same(load_vae(f"{NAME}/vae"), load_vae(TINY))
    assert asked(hub) == [(NAME, f"vae/{CONFIG}"), (NAME, f"vae/{SAFETENSORS}")]


def test_a_folder_goes_before_a_name(hub, published):
    shutil.copytree(TINY, NAME)
    assert_same(load_vae(NAME), load_vae(TINY))
    assert hub.asked == []


@pytest.mark.parametrize("name", ["vae", "/a/b", "./a", "../a", "a/", "a/b c", "a/.b", ""])
def test_what_is_no_name_is_not_asked_for(hub, name):
    if name:
        assert_refused(name, "is no folder")
    else:
        assert_refused(name, "cannot read config.json")  # the current folder
    assert hub.asked == []


def test_a_download_that_fails_is_one_line(hub, published):
    hub.fails = ConnectionError("Name or service not known")
    assert_refused(NAME, f"^{NAME} does not exist here, and the Hugging Face Hub does not give it.*ConnectionError")


@pytest.mark.parametrize("name", [CONFIG, SAFETENSORS])
def test_a_repository_of_something_else_is_one_line(hub, published, name):
    (published / name).unlink()
    assert_refused(NAME, f"^{NAME} has no {name} on the Hugging Face Hub: is it an autoencoder")
    assert hub.asked == []


def test_the_identity_is_the_weights_whatever_the_file(folder, tensors):
    identity = vae_identity(*load_vae(TINY))
    assert re.fullmatch("[0-9a-f]{12}", identity)
    # As the docstring says, from the file itself.
    digest = hashlib.sha256(b"groups=32")
    for name in sorted(tensors):
        shape = ",".join(map(str, tensors[name].shape))
        digest.update(f"\n{name} {shape}\n".encode() + tensors[name].astype("<f4").tobytes())
    assert identity == digest.hexdigest()[:12]
    save_file(renamed(tensors, True), folder / SAFETENSORS)
    assert vae_identity(*load_vae(folder)) == identity
    (folder / SAFETENSORS).unlink()
    save_state_dict(tensors, folder / TORCH)
    assert vae_identity(*load_vae(folder)) == identity


def test_another_network_has_another_identity(folder, tensors):
    config, params = load_vae(TINY)
    identities = {vae_identity(config, params), vae_identity(dataclasses.replace(config, norm_num_groups=16), params)}
    for name in (QUERY, "post_quant_conv.bias"):
        changed = tensors[name].copy()
        changed.flat[0] = np.nextafter(changed.flat[0], np.float32(9))
        save_file(tensors | {name: changed}, folder / SAFETENSORS)
        identities.add(vae_identity(*load_vae(folder)))
    one, other = "encoder.conv_norm_out.weight", "encoder.conv_norm_out.bias"
    save_file(tensors | {one: tensors[other], other: tensors[one]}, folder / SAFETENSORS)
    identities.add(vae_identity(*load_vae(folder)))
    assert len(identities) == 5
    shown = dataclasses.replace(config, sample_size=512, scaling_factor=1.0)
    assert vae_identity(shown, params) in identities, "what does not change latents does not count"
