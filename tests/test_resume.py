"""Which changes of configuration may continue a run: the ones decided in mid-run are told, the others refused."""

import dataclasses
import json

import pytest

from terdit_jax.config import RunConfig
from terdit_jax.data.synthetic import make_synthetic
from terdit_jax.errors import UserError
from terdit_jax.training.resume import check_resumable, describe_run
from terdit_jax.training.teacher import Teacher

FINGERPRINT = "0123456789abcdef" * 4
DATA = dataclasses.replace(make_synthetic((8, 8, 1), 10).metadata, fingerprint=FINGERPRINT)

FREE = {
    "name": "renamed", "compute.dtype": "float32", "compute.remat": "block", "mesh.fsdp": 8,
    "optimizer.learning_rate": 1e-4, "optimizer.drop_step": 1000, "optimizer.ema_ramp": True, "checkpoint.every": 7,
    "log.every": 7, "sample.cfg_scale": 1.5, "train.num_steps": 7, "train.accumulation_steps": 2,
    "train.max_nonfinite_steps": 3, "data.dir": "elsewhere", "data.in_memory": True, "data.read_threads": 2,
    "data.prefetch": 2, "train.teacher_weight": 0.0, "train.teacher_mode": "fast",
}  # fmt: skip
FIXED = {
    "seed": 1, "model.depth": 2, "model.ternary": False, "model.alpha_init": "least_squares",
    "model.alpha_per": "channel", "model.gamma_per": "channel", "model.threshold": 0.7,
    "model.class_dropout_prob": 0.0, "train.batch_size": 128, "data.horizontal_flip": False, "data.synthetic": True,
    "diffusion.objective": "flow", "diffusion.shift": 3.0, "train.teacher": "runs/full",
}  # fmt: skip


def changed(**fields):
    return RunConfig().with_fields(fields)


def saved_run():
    """The description of a run as the checkpoint's JSON returns it."""
    return json.loads(json.dumps(describe_run(RunConfig(), 120, DATA)))


def check(config, fingerprint=FINGERPRINT):
    return check_resumable(saved_run(), config, fingerprint, "runs/a")


def value_of(field):
    value = RunConfig().to_dict()
    for name in field.split("."):
        value = value[name]
    return value


def test_a_saved_run_says_what_it_is():
    run = saved_run()
    assert (run["step"], run["seed"], run["data_fingerprint"]) == (120, 0, FINGERPRINT)
    assert run["config"] == RunConfig().to_dict()
    assert (run["latent_scale"], run["codec"]) == (1.0, "none")


def test_the_same_configuration_continues_silently():
    assert check(RunConfig()) == []


@pytest.mark.parametrize("field", FREE)
def test_a_free_field_is_reported_with_both_values(field):
    assert check(changed(**{field: FREE[field]})) == [f"config.{field}: {value_of(field)!r} -> {FREE[field]!r}"]


@pytest.mark.parametrize("field", FIXED)
def test_a_fixed_field_is_refused_with_both_values(field):
    with pytest.raises(UserError) as caught:
        check(changed(**{field: FIXED[field]}))
    message = str(caught.value)
    assert "runs/a" in message and "\n" not in message
    assert f"{field}={value_of(field)!r}, not {FIXED[field]!r}" in message


def test_a_teacher_may_move_but_not_become_another():
    """Without weight it is not read, and says nothing."""
    there, moved = changed(**{"train.teacher": "runs/full"}), changed(**{"train.teacher": "runs/moved"})
    teacher = Teacher({}, lambda *_: None, 1.0, FINGERPRINT)
    run = json.loads(json.dumps(describe_run(there, 120, DATA, FINGERPRINT)))
    for given in (teacher, None):
        changes = check_resumable(run, moved, FINGERPRINT, "runs/a", given)
        assert changes == ["config.train.teacher: 'runs/full' -> 'runs/moved'"]
    with pytest.raises(UserError, match="runs/a was taught by weights 0123456789abcdef01234567, .* now holds ffff"):
        check_resumable(run, moved, FINGERPRINT, "runs/a", dataclasses.replace(teacher, fingerprint="f" * 64))
    with pytest.raises(UserError, match="train.teacher='runs/full', not ''"):
        check_resumable(run, RunConfig(), FINGERPRINT, "runs/a")
    with pytest.raises(UserError, match="does not describe a run"):
        check_resumable(run | {"teacher": 3}, moved, FINGERPRINT, "runs/a", teacher)


def test_every_field_of_the_model_is_fixed():
    """Spelled out as a rule, so that a field that is added to the model is fixed too."""
    for name in vars(RunConfig().model):
        run = saved_run()
        run["config"]["model"][name] = "another"
        with pytest.raises(UserError, match=f"model.{name}='another'"):
            check_resumable(run, RunConfig(), FINGERPRINT, "runs/a")


def test_all_free_changes_are_reported_one_line_each():
    lines = check(changed(**FREE))
    assert [line.split(":")[0] for line in lines] == [f"config.{field}" for field in sorted(FREE)]


def test_a_fixed_field_is_refused_beside_free_ones():
    with pytest.raises(UserError, match="seed=0, not 5"):
        check(changed(**{**FREE, "seed": 5}))


def test_another_data_set_is_refused():
    other = "f" * 64
    with pytest.raises(UserError, match=f"(?s){FINGERPRINT[:24]}.*{other[:24]}") as caught:
        check(RunConfig(), other)
    assert "runs/a" in str(caught.value) and "\n" not in str(caught.value)


def test_a_field_that_one_side_lacks_is_refused_if_it_is_fixed():
    run = saved_run()
    del run["config"]["model"]["qk_norm"]
    with pytest.raises(UserError, match="model.qk_norm=None, not True"):
        check_resumable(run, RunConfig(), FINGERPRINT, "runs/a")


def test_a_run_from_before_fields_had_their_defaults():
    run = saved_run()
    del run["config"]["diffusion"], run["config"]["model"]["family"], run["config"]["model"]["learn_sigma"]
    assert check_resumable(run, RunConfig(), FINGERPRINT, "runs/a") == []
    with pytest.raises(UserError, match="diffusion.objective='ddpm', not 'flow'"):
        check_resumable(run, changed(**{"diffusion.objective": "flow"}), FINGERPRINT, "runs/a")
    del run["config"]["model"]["depth"]
    with pytest.raises(UserError, match="model.depth=None, not"):
        check_resumable(run, RunConfig(), FINGERPRINT, "runs/a")
