"""Every value that cannot work is refused by name, in one line, and the defaults are not."""

import pytest

from terdit_jax.config import base_config, validate
from terdit_jax.errors import UserError

POSITIVE = {
    "train.num_steps": 0, "train.batch_size": 0, "train.accumulation_steps": -1, "train.max_nonfinite_steps": 0,
    "optimizer.learning_rate": 0.0, "optimizer.drop_learning_rate": -1e-4, "optimizer.clip_norm": 0.0,
    "optimizer.eps": 0.0, "optimizer.spike_window": 0, "checkpoint.every": 0, "log.every": 0, "log.heldout_batches": 0,
    "log.score_samples": 0, "sample.cfg_t_max": 0,
    "sample.num_steps": 0, "sample.num_images": -4, "data.read_threads": 0, "data.prefetch": 0,
}  # fmt: skip
NOT_NEGATIVE = {
    "optimizer.drop_step": -1, "optimizer.spike_sigma": -1.0, "optimizer.weight_decay": -0.1,
    "checkpoint.keep_every": -1, "log.heldout_every": -1, "log.samples_every": -1, "log.score_every": -1,
    "sample.cfg_scale": -0.5, "sample.cfg_channels": -1, "sample.cfg_t_min": -1,
}  # fmt: skip
SHARES = {"optimizer.b1": 1.0, "optimizer.b2": -0.1, "optimizer.ema_decay": 1.0}
RULES = [
    *((field, value, "must be positive and finite") for field, value in POSITIVE.items()),
    *((field, value, "must be finite and not negative") for field, value in NOT_NEGATIVE.items()),
    *((field, value, "must be in [0, 1)") for field, value in SHARES.items()),
    ("optimizer.learning_rate", float("nan"), "must be positive and finite"),
    ("optimizer.learning_rate", float("inf"), "must be positive and finite"),
    ("checkpoint.keep", 1, "must be at least 2"),
    ("seed", -1, "must lie in [0, 2**32)"),
    ("seed", 2**32, "must lie in [0, 2**32)"),
    ("sample.cfg_scale", float("nan"), "must be finite and not negative"),
    ("optimizer.ema_decay", float("nan"), "must be in [0, 1)"),
]


def config_with(**fields):
    config = base_config()
    config.update_from_flattened_dict(fields)
    return config


def test_the_defaults_are_valid():
    validate(base_config())


@pytest.mark.parametrize(("field", "value", "rule"), RULES)
def test_a_value_that_cannot_work_is_refused(field, value, rule):
    with pytest.raises(UserError) as caught:
        validate(config_with(**{field: value}))
    assert str(caught.value) == f"config.{field}={value}: {rule}"


@pytest.mark.parametrize("field", [*NOT_NEGATIVE, *SHARES])
def test_zero_is_allowed_where_it_has_a_meaning(field):
    number = type(NOT_NEGATIVE.get(field, 0.0))
    validate(config_with(**{field: number(0)}))


def test_one_is_enough_where_a_count_must_be_positive():
    validate(config_with(**{field: 1 for field, value in POSITIVE.items() if isinstance(value, int)}))


def test_every_number_outside_model_and_mesh_has_a_rule():
    """Model fields are `DiTConfig`'s to check, mesh axes `make_mesh`'s."""
    numbers = {"seed"}
    for section, fields in base_config().to_dict().items():
        if isinstance(fields, dict) and section not in ("model", "mesh"):
            numbers |= {f"{section}.{name}" for name, value in fields.items() if type(value) in (int, float)}
    assert numbers == {field for field, _, _ in RULES}


def test_wrong_types_are_refused():
    with pytest.raises(TypeError):
        base_config().train.batch_size = "many"


def test_unknown_fields_are_refused():
    with pytest.raises(AttributeError, match="batchsize"):
        base_config().train.batchsize = 8


def test_configs_do_not_share_their_fields():
    base_config().model.depth = 1
    assert base_config().model.depth == 16
