"""Every field has a rule, values that cannot work are refused by name in one line, and the defaults are not."""

import json
import re

import pytest

from terdit_jax.choices import ALL_METHODS, NUM_TIMESTEPS, SPACINGS
from terdit_jax.config import FIELDS, RunConfig, base_config, freeze
from terdit_jax.config_file import nearest
from terdit_jax.errors import UserError
from terdit_jax.fast.gather import GATHERS

NAN, INF = float("nan"), float("inf")
# A field, what it refuses, and what it takes at its limits.
LIMITS = {
    "seed": ((-1, 2**32), (0, 2**32 - 1)),
    "model.hidden_size": ((0, -32, 2**31, 2**63), (4, 2**17)),
    "model.depth": ((0, 10**6), (1, 1024)),
    "model.class_dropout_prob": ((-0.1, 1.0, NAN, 1 - 1e-12), (0.0, 0.5)),
    "model.threshold": ((0, -0.5, NAN, INF, 1e-9, 1, 1e39), (1e-3, 0.7, 0.999)),
    "diffusion.objective": (("", "sit"), ("ddpm", "flow")),
    "diffusion.path": (("", "vp"), ("linear", "gvp")),
    "diffusion.logit_mean": ((NAN, INF, -INF, 1e39), (-1e38, 0, 1.5)),
    "diffusion.logit_std": ((0.0, -1.0, NAN, INF), (1e-30, 1)),
    "diffusion.shift": ((0, -1.0, 9e-4, 1001, NAN, INF), (1e-3, 1, 3.0, 1e3)),
    "mesh.data": ((0, -2, 2**40), (-1, 1)),
    "mesh.slices": ((0, -1), (1,)),
    "data.read_threads": ((0, 10**6), (1, 1024)),
    "optimizer.learning_rate": ((0.0, -1e-4, 1e39, 1e-50, NAN, INF), (1e-30, 1)),
    "optimizer.clip_norm": ((0.0, 1e-46, 1e-40, 1e39, NAN), (1e-30, 1e38)),
    "optimizer.weight_decay": ((-0.1, 1e39, NAN, INF), (0.0, -0.0, 1e-50)),
    "optimizer.b1": ((1.0, -0.1, NAN, 1 - 1e-10), (0.0, 0.999)),
    "optimizer.ema_decay": ((1.0, 0.99999999999, NAN), (0.0, 0.99999)),
    "optimizer.drop_step": ((-1, 2**31), (0, 2**31 - 1)),
    "train.num_steps": ((0, -1, 10**18), (1, 2**31 - 1)),
    "checkpoint.keep": ((1, 0, -2), (2,)),
    "log.heldout_every": ((-1, 2**63), (0,)),
    "sample.cfg_scale": ((-0.5, NAN, INF, 1e39), (0.0, 1, 4.5)),
    "sample.num_steps": ((0, NUM_TIMESTEPS + 1, 10**18), (1, NUM_TIMESTEPS)),
    "sample.cfg_t_max": ((0, NUM_TIMESTEPS + 1), (1, NUM_TIMESTEPS)),
    "sample.method": (("", "DDPM", "ddpm "), ALL_METHODS),
    "sample.spacing": (("", "none"), ("auto", *SPACINGS)),
    "mesh.gather": (("", "int8"), GATHERS),
    "name": (("", " ", "a\nb", "x" * 101, " x"), ("x", "Ж 1")),
}


def test_the_defaults_are_valid_and_those_of_base_config():
    assert freeze(base_config()) == RunConfig()
    assert json.dumps(RunConfig().to_dict()) == json.dumps(base_config().to_dict())


def test_every_field_but_a_boolean_has_a_rule_and_every_field_a_meaning():
    for field in FIELDS.values():
        assert (field.rule is None) == isinstance(field.default, bool)
        assert field.meaning.endswith(".") and "\n" not in field.meaning


@pytest.mark.parametrize("field", LIMITS)
def test_a_rule_takes_what_lies_within_its_limits_and_names_what_does_not(field):
    refused, taken = LIMITS[field]
    for value in taken:
        RunConfig().with_fields({field: value})
    for value in refused:
        with pytest.raises(UserError, match=re.escape(FIELDS[field].rule.words)) as caught:
            RunConfig().with_fields({field: value})
        assert str(caught.value).startswith(f"config.{field}=") and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", [name for name, field in FIELDS.items() if type(field.default) is int])
def test_no_whole_number_reaches_beyond_32_bits(field):
    for value in (2**63, -(2**63), 10**30):
        with pytest.raises(UserError):
            RunConfig().with_fields({field: value})


def test_wrong_types_are_refused():
    with pytest.raises(TypeError):
        base_config().train.batch_size = "many"
    for field, value, words in (
        ("train.batch_size", True, "must be of type int, not bool"),
        ("model.qk_norm", 1, "must be of type bool, not int"),
        ("optimizer.eps", 10**400, "must be of type float, not int"),
    ):
        with pytest.raises(UserError, match=f"config.{field}=.*: {words}"):
            RunConfig().with_fields({field: value})


def test_whole_numbers_are_floats_where_fields_are():
    assert type(RunConfig().with_fields({"sample.cfg_scale": 4}).sample.cfg_scale) is float


def test_a_configuration_without_a_field_is_refused():
    config = base_config().unlock()
    del config.log
    with pytest.raises(UserError, match="config.log.every is missing"):
        freeze(config)


def test_unknown_fields_are_refused():
    with pytest.raises(AttributeError, match="batchsize"):
        base_config().train.batchsize = 8
    with pytest.raises(UserError, match="config.train.batchsize: there is no such field"):
        RunConfig().with_fields({"train.batchsize": 8})


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("train.batchsize", "train.batch_size"),
        ("batch_size", "did you mean train.batch_size"),
        ("optimizer.batch_size", "train.batch_size"),
        ("optimizer.lr", "config.optimizer has b1, b2"),
        ("train.epochs", "config.train has accumulation_steps"),
        ("modle.depth", "model.depth"),
        ("data.folder", "config.data has dir"),
        ("zzz", "docs/configs.md"),
    ],
)
def test_an_unknown_field_is_told_what_may_have_been_meant(field, meant):
    assert meant in nearest(field, sorted(FIELDS))


def test_configs_do_not_share_their_fields():
    base_config().model.depth = 1
    assert base_config().model.depth == 16


def test_a_configuration_reads_as_a_field_a_line_with_changes_marked():
    lines = str(RunConfig().with_fields({"mesh.data": 4, "train.init_from": "a/b"})).splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("*")] == [
        name for name in FIELDS if name not in ("mesh.data", "train.init_from")
    ]
    assert [" ".join(line.split()) for line in lines if line.startswith("*")] == [
        "* mesh.data 4 (default -1)",
        "* train.init_from 'a/b' (default '')",
    ]
