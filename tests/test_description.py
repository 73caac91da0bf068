"""A description survives JSON, fits its tensors, and is refused in one line where it was tampered with."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from terdit_jax.config import RunConfig
from terdit_jax.config_sections import DiffusionConfig, ModelConfig, SampleConfig
from terdit_jax.data.synthetic import make_synthetic
from terdit_jax.errors import UserError
from terdit_jax.interop.description import (
    PUBLISHED_SHAPES,
    Description,
    architecture,
    check_architecture,
    describe_published,
    describe_run,
    public_model_args,
)
from terdit_jax.interop.published import published_layout
from terdit_jax.training import resume
from tests.deployed import VARIANTS, describe, small_config
from tests.golden_models import tiny_config

ENORMOUS, GONE = 10**400, "gone"


def model_of(**fields):
    return architecture(ModelConfig(**fields))


def published_model(name, **fields):
    width, depth = PUBLISHED_SHAPES[name]
    return model_of(hidden_size=width, depth=depth, **fields)


@pytest.mark.parametrize("name", PUBLISHED_SHAPES)
def test_published_checkpoints_are_described_by_their_shapes(name):
    model = published_model(name)
    arguments = {"model": name, "image_size": 256, "vae": "mse"}
    description = describe_published(published_layout(model, packed=True), arguments, True, "a.pth")
    assert (description.name, description.model) == (name, model)
    assert (description.ema, description.step) == (True, None)
    assert (description.codec, description.latent_scale) == ("sd-vae-ft-mse", 0.18215)
    assert description.sample == SampleConfig()


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({"input_size": 64}, {"image_size": 512}),
        ({"qk_norm": False}, {}),
        ({"num_kv_heads": 8}, {}),
        ({"num_classes": 10}, {"num_classes": 10}),
        ({"adaln_rms_norm": False}, {}),
        ({"ternary": False, "adaln_rms_norm": False}, {}),
    ],
)
def test_a_published_model_with_something_different(fields, arguments):
    model = published_model("DiT_Llama_600M_patch2", **fields)
    for packed in {model.ternary, False}:
        layout = published_layout(model, packed)
        assert describe_published(layout, arguments, False, "a.pth").model == model


def test_a_shape_that_was_never_published_is_refused():
    with pytest.raises(UserError, match="a.pth: width 64 with 3 layers is none of the published models"):
        describe_published(published_layout(tiny_config(), True), {}, True, "a.pth")


@pytest.mark.parametrize(
    "arguments",
    [{"image_size": "256"}, {"image_size": 0}, {"image_size": True}, {"image_size": 1 << 40}, {"image_size": ENORMOUS},
     {"image_size": None}, {"vae": "kl"}, {"vae": None}, {"vae": ["ema"]}, {"vae": "x" * 10_000}],
)  # fmt: skip
def test_model_args_that_make_no_sense_are_named(arguments):
    layout = published_layout(published_model("DiT_Llama_600M_patch2"), True)
    with pytest.raises(UserError, match="a.pth: model_args has image_size=.*, vae=") as caught:
        describe_published(layout, arguments, True, "a.pth")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("size", [4, 250])
def test_an_image_size_that_makes_no_model_is_refused(size):
    layout = published_layout(published_model("DiT_Llama_600M_patch2"), True)
    with pytest.raises(UserError, match="model.input_size="):
        describe_published(layout, {"image_size": size}, True, "a.pth")


FLOAT = np.dtype(np.float32)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x_embedder.weight", None, "lacks tensor 'x_embedder.weight'"),
        ("x_embedder.weight", (FLOAT, (64,)), "lacks matrices"),
        ("y_embedder.embedding_table.weight", None, "lacks tensor 'y_embedder"),
        ("y_embedder.embedding_table.weight", (FLOAT, ()), "lacks"),
        ("layers.0.attention.wk.weight", None, "lacks tensor 'layers.0.attention.wk"),
        ("layers.0.attention.wk.weight", (FLOAT, ()), "lacks"),
        ("layers.0.feed_forward.w1.weight", None, "lacks tensor 'layers.0.feed_forward"),
    ],
)
def test_another_networks_tensors_are_refused(name, tensor, message):
    layout = dict(published_layout(small_config(), True))
    layout.pop(name) if tensor is None else layout.update({name: tensor})
    with pytest.raises(UserError, match=f"a.pth: not a TerDiT or Large-DiT checkpoint, it {message}"):
        describe_published(layout, {}, True, "a.pth")


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("step", [None, 12])
def test_it_survives_json(overrides, step):
    description = describe(small_config(**overrides), step=step, latent_scale=0.5)
    text = json.dumps(description.to_dict())
    assert Description.from_dict(json.loads(text), "a") == description


def test_the_model_fields_are_those_of_the_configuration():
    assert set(describe(small_config()).to_dict()["model"]) == set(vars(ModelConfig()))
    # How a model is computed is the reader's choice and not described.
    model = dataclasses.replace(small_config(), dtype="bfloat16", layers="unrolled")
    assert Description.from_dict(describe(model).to_dict(), "a").model == describe(small_config()).model


def changed(change):
    """The fields of a description, and of its parts, with others in their place or without those that are GONE."""
    fields = json.loads(json.dumps(describe(small_config()).to_dict()))
    for name, value in change.items():
        fields[name] = fields[name] | value if isinstance(value, dict) and name != "provenance" else value
    parts = (fields, fields["model"]) if isinstance(fields["model"], dict) else (fields,)
    for part in parts:
        for name in [name for name, value in part.items() if value is GONE]:
            del part[name]
    return fields


MALFORMED = [
    [],
    *({name: value} for name, value in (
        ("author", "me"), ("ema", GONE), ("name", 3), ("model", []), ("ema", 1), ("step", 1.5), ("step", True),
        ("step", -1), ("codec", None), ("latent_scale", 0), ("latent_scale", "1"), ("latent_scale", float("inf")),
        ("latent_scale", float("nan")), ("latent_scale", ENORMOUS), ("provenance", {"seed": 0}), ("provenance", "here"),
    )),
    *({"model": {name: value}} for name, value in (
        ("experts", 8), ("qk_norm", GONE), ("depth", "2"), ("depth", True), ("depth", 2.0), ("depth", 0), ("depth", -1),
        ("depth", ENORMOUS), ("hidden_size", 1 << 20), ("ternary", 1), ("class_dropout_prob", float("nan")),
        ("class_dropout_prob", ENORMOUS), ("positions", "learned"), ("positions", "x\n" * 10_000), ("num_heads", 3),
        ("patch_size", 3), ("x\n" * 10_000, 1),
    )),
    *({"sample": {name: value}} for name, value in (
        ("eta", 1.0), ("num_steps", 5.0), ("cfg_scale", float("inf")), ("cfg_scale", ENORMOUS), ("method", None),
    )),
]  # fmt: skip


@pytest.mark.parametrize("change", MALFORMED, ids=lambda change: str(change)[:50])
def test_a_malformed_description_is_one_short_line(change):
    fields = changed(change) if change else []
    with pytest.raises(UserError) as caught:
        Description.from_dict(fields, "a.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert str(caught.value).startswith("a.safetensors: ")


def test_what_the_sample_section_leaves_out_has_its_default():
    fields = changed({}) | {"sample": {"num_steps": 9, "cfg_scale": 3}}
    assert Description.from_dict(fields, "a").sample == SampleConfig(num_steps=9, cfg_scale=3.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 64}, "hidden_size=64, its tensors have 32"),
        ({"depth": 3}, "depth=3, its tensors have 2"),
        ({"in_channels": 3}, "patch_width=12, its tensors have 16"),
        ({"num_classes": 11}, "num_classes=11, its tensors have 10"),
        ({"num_kv_heads": 1}, "kv_width=16, its tensors have 32"),
        ({"ffn_multiple_of": 64}, "mlp_width=128, its tensors have 96"),
        ({"qk_norm": False}, "qk_norm=False, its tensors have True"),
        ({"adaln_rms_norm": False}, "adaln_rms_norm=False, its tensors have True"),
        ({"ternary": False}, "ternary=False, its tensors have True"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_description_of_another_model_is_refused(overrides, message, packed):
    layout = published_layout(small_config(), packed)
    check_architecture(small_config(), layout, "a")
    with pytest.raises(UserError, match=f"a: describes a model with {message}"):
        check_architecture(small_config(**overrides), layout, "a")


def test_a_full_precision_model_has_no_adaln_norm_whatever_the_field_says():
    for adaln_rms_norm in (True, False):
        model = small_config(ternary=False, adaln_rms_norm=adaln_rms_norm)
        check_architecture(model, published_layout(model, False), "a")


def test_a_run_describes_itself():
    fields = {"name": "mine", "seed": 3, "model.num_kv_heads": 8, "sample.cfg_scale": 1.5, "compute.dtype": "float32"}
    config = RunConfig().with_fields(fields)
    run = json.loads(json.dumps(resume.describe_run(config, 120, make_synthetic((32, 32, 4), 1000).metadata)))
    description = describe_run(run, ema=False, source="runs/a")
    assert (description.name, description.ema, description.step) == ("mine", False, 120)
    assert (description.model.num_kv_heads, description.model.num_heads) == (8, 32)
    assert (description.codec, description.latent_scale) == ("none", 1.0)
    assert description.sample.cfg_scale == 1.5 and description.provenance["seed"] == "3"
    assert Description.from_dict(json.loads(json.dumps(description.to_dict())), "a") == description


@pytest.mark.parametrize("name", PUBLISHED_SHAPES)
@pytest.mark.parametrize("image_size", [256, 512])
def test_model_args_of_a_published_model_describe_it_again(name, image_size):
    model = published_model(name, input_size=image_size // 8)
    description = describe(model, codec="sd-vae-ft-mse", latent_scale=0.18215)
    arguments, as_published = public_model_args(description)
    assert as_published
    assert arguments == {
        "model": name, "image_size": image_size, "num_classes": 1000, "qk_norm": True, "vae": "mse",
    }  # fmt: skip
    again = describe_published(published_layout(model, True), arguments, True, "a.pth")
    assert (again.model, again.codec, again.latent_scale) == (model, description.codec, description.latent_scale)


@pytest.mark.parametrize(
    "fields",
    [{"depth": 8}, {"num_heads": 16}, {"num_kv_heads": 8}, {"positions": "rope_1d_sincos_2d"}, {"num_classes": 10},
     {"adaln_rms_norm": False}, {"in_channels": 16}, {"patch_size": 4}, {"ffn_multiple_of": 512}],
)  # fmt: skip
def test_a_model_that_the_public_sampler_cannot_build_says_so(fields):
    model = published_model("DiT_Llama_600M_patch2", **{"num_classes": 1000, **fields} if "depth" not in fields else {})
    model = dataclasses.replace(model, **fields)
    assert not public_model_args(describe(model))[1]


def test_the_public_sampler_cannot_draw_from_a_flow_model():
    model, flow = published_model("DiT_Llama_600M_patch2"), DiffusionConfig("flow")
    assert public_model_args(describe(model))[1] and not public_model_args(describe(model, diffusion=flow))[1]


def test_a_file_from_before_there_was_a_choice_is_of_ddpm():
    description = describe(small_config())
    fields = description.to_dict()
    assert fields.pop("diffusion")["objective"] == "ddpm"
    assert Description.from_dict(fields, "a.safetensors") == description


def test_what_a_flow_model_learned_survives_json():
    flow = DiffusionConfig("flow", path="gvp", shift=3.0)
    description = describe(small_config(), diffusion=flow)
    again = Description.from_dict(json.loads(json.dumps(description.to_dict())), "a.safetensors")
    assert again == description and again.diffusion == flow


@pytest.mark.parametrize(
    ("diffusion", "message"),
    [
        ({"objective": "sit"}, "description.diffusion.objective='sit': choose one of ddpm, flow"),
        ({"objective": "flow", "shift": -1.0}, "description.diffusion.shift=-1.0: must be positive"),
        ({"objective": "flow", "shift": float("nan")}, "description.diffusion.shift=nan is of the wrong type"),
        ({"path": "gvp"}, "makes no model: diffusion.path='gvp': read with diffusion.objective='flow' alone"),
        ({"speed": 1}, "unknown field 'speed'"),
        (None, "description.diffusion=None is of the wrong type"),
    ],
)
def test_an_objective_that_makes_no_sense_is_named(diffusion, message):
    fields = describe(small_config()).to_dict() | {"diffusion": diffusion}
    with pytest.raises(UserError) as caught:
        Description.from_dict(fields, "a.safetensors")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_pixels_are_not_counted_eightfold():
    arguments, as_published = public_model_args(describe(small_config(in_channels=1)))
    assert not as_published and (arguments["image_size"], arguments["vae"]) == (8, "ema")


def test_changing_a_copy_does_not_change_the_original():
    description = describe(small_config())
    fields = description.to_dict()
    before = copy.deepcopy(fields)
    description.to_dict()["sample"].clear()
    assert description.to_dict() == before
