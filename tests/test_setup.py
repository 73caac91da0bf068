"""Bad input is one line and leaves no files, whatever part of a run finds it."""

import os
from pathlib import Path

import pytest

from terdit_jax.config import RunConfig
from terdit_jax.errors import UserError
from terdit_jax.training.setup import set_up
from tests.runs import SHRUNKEN, execute, prepare_digits, train_arguments


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


def digits_config(digits, **overrides):
    fields = {
        "model.input_size": 8, "model.in_channels": 1, "model.patch_size": 4, "model.num_heads": 4,
        "model.num_classes": 10, "data.horizontal_flip": False, "data.dir": str(digits), **SHRUNKEN,
    }  # fmt: skip
    return RunConfig().with_fields({**fields, **{k.replace("__", "."): v for k, v in overrides.items()}})


def test_a_sound_configuration_is_taken_and_nothing_written(digits, tmp_path):
    setup = set_up(digits_config(digits), tmp_path / "new" / "run")
    assert setup.model.sample_shape == (8, 8, 1) and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__num_heads": 5}, "hidden_size=32 is not divisible by model.num_heads=5"),
        ({"model__depth": 0}, "model.depth=0: must lie in"),
        ({"model__hidden_size": -32}, "model.hidden_size=-32: must lie in"),
        ({"model__positions": "rope"}, "choose one of rope_1d, rope_1d_sincos_2d"),
        ({"train__batch_size": 12}, "batch_size=12 is not divisible by accumulation_steps=1 times the 8 devices"),
        ({"train__accumulation_steps": 3}, "batch_size=16 is not divisible by accumulation_steps=3"),
        ({"train__batch_size": 0}, "train.batch_size=0: must lie in"),
        ({"train__num_steps": -1}, "train.num_steps=-1: must lie in"),
        ({"train__batch_size": 2**30}, "batch_size=1073741824: a device would hold at least"),
        (
            {"train__batch_size": 2**24, "train__accumulation_steps": 2**21, "data__prefetch": 1024},
            "batch_size=16777216, config.data.prefetch=1024: needs 4,406,636,445,696 bytes, and there are",
        ),
        ({"model__hidden_size": 2**15}, "parameters, config.train.batch_size=16: a device would hold at least"),
        ({"model__input_size": 8192, "train__batch_size": 8}, "a device would hold at least"),
        ({"log__samples_every": 1, "sample__num_images": 2**31 - 1}, "num_images=2147483647: needs"),
        ({"mesh__data": 3}, "does not multiply out to the 8 devices"),
        ({"mesh__data": 1, "mesh__tensor": 8}, "tensor=8 does not divide the 4 kv heads"),
        ({"mesh__fsdp": 8, "model__hidden_size": 36, "model__num_heads": 2}, "fsdp=8 does not divide dimension 36 of"),
        (
            {"mesh__data": 4, "mesh__fsdp": 2, "model__num_heads": 16, "model__num_kv_heads": 1},
            "no multiple of 4 each to be packed: set config.mesh.gather=bfloat16",
        ),
        (
            {"compute__attention": "cudnn", "compute__dtype": "bfloat16"},
            "attention='cudnn' runs on GPUs, and there is none",
        ),
        (
            {"compute__attention": "cudnn", "compute__dtype": "float32"},
            "attention='cudnn': takes bfloat16 and heads of",
        ),
        ({"optimizer__weight_decay": float("inf")}, "weight_decay=inf: must be finite and not negative"),
        ({"optimizer__learning_rate": 0.0}, "learning_rate=0.0: must be positive"),
        ({"train__compiler_options": "--xla_no_such=1"}, "No such compile option: 'xla_no_such'"),
        ({"train__soft_start_steps": 10, "model__ternary": False}, "soft_start_steps=10: ends at ternary weights, and"),
        (
            {"train__soft_start_steps": 10},
            "soft_start_steps=10: ends at alpha T, and config.model.alpha_init='normal'",
        ),
        (
            {"train__soft_start_steps": 40, "model__alpha_init": "least_squares"},
            "soft_start_steps=40: is not over before config.train.num_steps=40; give fewer",
        ),
        ({"train__soft_start_steps": -1}, "train.soft_start_steps=-1: must lie in"),
        ({"data__dir": ""}, "config.data.dir is empty"),
        ({"data__dir": "/nowhere/digits"}, "/nowhere/digits"),
        ({"model__in_channels": 3}, r"records of shape \(8, 8, 1\), the model takes \(8, 8, 3\)"),
        ({"model__num_classes": 7}, "has 10 classes, config.model.num_classes=7"),
    ],
)
def test_what_does_not_fit_is_named(digits, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        set_up(digits_config(digits, **overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_unwritable_workdir(digits, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="--workdir=.*takes no files"):
        set_up(digits_config(digits), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("main", ["--config=configs/digits.py", "--workdir=W", "--config.model.width=3"], "width"),
        ("main", ["--config=configs/digits.py", "--workdir=W", "--config.model.depth=deep"], "depth"),
        ("main", ["--config=configs/digits.py", "--workdir=W", "--config.train.compiler_options=x"], "--name=value"),
        ("main", ["--config=configs/nothing.py", "--workdir=W"], "configs/nothing.py"),
        ("main", ["--workdir=W"], "--config and --workdir are both needed"),
        ("main", ["--config=configs/digits.py", "--workdir=W", "digits"], "unexpected argument 'digits'"),
        ("sample", ["--model=W", "--output=grid.gif"], "must end in .png or .npz"),
        ("sample", ["--model=W", "--output=grid.png"], "run does not exist"),
        ("sample", ["--model=W", "--output=grid.png", "--num_samples=0"], "--num_samples=0: 0 is not an integer"),
        ("sample", ["--model=W", "--output=grid.png", "--guidance=4"], "guidance"),
        ("sample", ["--model=W", "--output=grid.png", "--vae=nowhere"], "nowhere is no folder"),
    ],
)
def test_commands_answer_in_one_line_with_status_2(tmp_path, module, arguments, message):
    arguments = [argument.replace("=W", f"={tmp_path / 'run'}") for argument in arguments]
    out, err = execute(module, *arguments, status=2)
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("error: ") and message in line and not out
    assert not (tmp_path / "run").exists()


def test_a_data_set_changed_under_a_workdir_is_refused(digits, tmp_path):
    workdir, other = tmp_path / "run", tmp_path / "other"
    arguments = train_arguments(digits, workdir, train__num_steps=2, log__heldout_every=0)
    execute("main", *arguments)
    execute("prepare", "--source=digits", "--heldout_share=0.5", f"--output={other}")
    arguments = train_arguments(other, workdir, train__num_steps=4, log__heldout_every=0)
    _, err = execute("main", *arguments, status=2)
    assert "was trained on data set" in err and sorted(p.name for p in Path(workdir, "checkpoints").iterdir()) == ["2"]
    label = ["--labels=0,10", f"--model={workdir}", f"--output={tmp_path / 'grid.png'}"]
    _, err = execute("sample", *label, status=2)
    assert "label 10 is out of range" in err and not (tmp_path / "grid.png").exists()
