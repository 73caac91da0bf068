"""A description survives JSON, fits its tensors, and is refused in one line where it was tampered with."""

import copy
import dataclasses
import json

import pytest

from terdit_jax.config import RunConfig
from terdit_jax.config_sections import DiffusionConfig, ModelConfig, SampleConfig
from terdit_jax.data.synthetic import make_synthetic
from terdit_jax.errors import UserError
from terdit_jax.interop.description import Description, describe_run
from terdit_jax.training import resume
from tests.deployed import VARIANTS, describe, small_config

ENORMOUS, GONE = 10**400, "gone"


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("step", [None, 12])
def test_it_survives_json(overrides, step):
    description = describe(small_config(**overrides), step=step, latent_scale=0.5)
    text = json.dumps(description.to_dict())
    assert Description.from_dict(json.loads(text), "a") == description


def test_the_model_fields_are_those_of_the_configuration():
    other = {"alpha_per": "channel", "gamma_per": "channel", "threshold": 0.7}  # which older readers do not know
    assert set(describe(small_config(**other)).to_dict()["model"]) == set(vars(ModelConfig()))
    assert set(describe(small_config()).to_dict()["model"]) == vars(ModelConfig()).keys() - other.keys()
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
        ("patch_size", 3), ("x\n" * 10_000, 1), ("alpha_per", "row"), ("gamma_per", None), ("threshold", 0),
        ("threshold", float("nan")), ("threshold", "0.7"), ("threshold", ENORMOUS),
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


def test_a_run_names_its_classes_and_files_without_names_are_as_ever():
    run = resume.describe_run(RunConfig(), 1, make_synthetic((32, 32, 4), 1000).metadata)
    described = describe_run(run, ema=True, source="runs/a")
    assert described.class_names == tuple(map(str, range(1000)))
    assert Description.from_dict(json.loads(json.dumps(described.to_dict())), "a") == described
    before = describe_run({name: value for name, value in run.items() if name != "class_names"}, True, "runs/a")
    assert before.class_names == () and "class_names" not in before.to_dict()
    too_long = dataclasses.replace(make_synthetic((8, 8, 4), 2).metadata, class_names=("x" * 400_000, "y" * 400_000))
    assert resume.describe_run(RunConfig(), 1, too_long)["class_names"] == []
    for forged in (["a"], [*range(1000)], "a" * 1000, ["\ud800"] * 1000, ["a" * 600] * 1000, None):
        with pytest.raises(UserError, match="^runs/a: "):
            describe_run(run | {"class_names": forged}, ema=True, source="runs/a")


def test_a_run_names_its_teacher():
    metadata = make_synthetic((32, 32, 4), 1000).metadata
    run = resume.describe_run(RunConfig(), 1, metadata, "f" * 64)
    assert describe_run(run, ema=True, source="runs/a").provenance["teacher"] == "f" * 64
    for forged in (3, None, "f" * 201, "\n"):
        with pytest.raises(UserError, match="runs/a: its newest checkpoint does not describe a run"):
            describe_run(run | {"teacher": forged}, ema=True, source="runs/a")


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
        ({"objective": "flow", "shift": -1.0}, "description.diffusion.shift=-1.0: must lie in [0.001, 1000]"),
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


def test_changing_a_copy_does_not_change_the_original():
    description = describe(small_config())
    fields = description.to_dict()
    before = copy.deepcopy(fields)
    description.to_dict()["sample"].clear()
    assert description.to_dict() == before
