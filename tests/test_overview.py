"""`main --print_config` says what a run would be, with the bytes its arrays take, and does nothing else."""

import re

import jax
import pytest

from terdit_jax.config import RunConfig
from terdit_jax.config_sections import MeshConfig
from terdit_jax.fast.plan import choose_plan
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.training.optimizer import make_optimizer
from terdit_jax.training.overview import state_bytes
from terdit_jax.training.state import make_state
from tests.deployed import small_config
from tests.runs import execute


def test_bytes_are_those_of_the_arrays_that_a_device_holds():
    config, model = RunConfig(), small_config(num_heads=4)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = make_state(model, make_optimizer(config.optimizer), mesh, 0)

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    sizes = state_bytes(config, model, mesh, choose_plan(model, mesh))
    for kind, name in (("parameters", "params"), ("moments", "opt_state"), ("EMA", "ema_params")):
        assert sizes[kind] == held(state[name])
    assert sizes["codes"] > held(state["window"]["codes"]) > 0
    assert sizes["gradients"] == sizes["parameters"], "all of them float32"


@pytest.mark.parametrize(("dtype", "steps", "width"), [("bfloat16", 1, 2), ("bfloat16", 2, 4), ("float32", 1, 4)])
def test_gradients_of_ternary_matrices_have_their_dtype_unless_microbatches_are_summed(dtype, steps, width):
    config, mesh = RunConfig().with_fields({"train.accumulation_steps": steps}), make_mesh(MeshConfig())
    models = [small_config(depth=depth, grad_dtype=dtype) for depth in (1, 2)]
    sizes = [state_bytes(config, model, mesh, choose_plan(model, mesh))["gradients"] for model in models]
    model = small_config()
    matrices = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.mlp_width
    matrices += 6 * model.hidden_size * model.condition_width
    others = 4 * (small_config(depth=2).num_params - small_config(depth=1).num_params - matrices)
    assert sizes[1] - sizes[0] == width * matrices + others


def test_a_configuration_is_printed_and_nothing_is_started(tmp_path):
    flags = [f"--workdir={tmp_path / 'run'}", "--config.train.num_steps=7", "--print_config"]
    out, err = execute("main", "--config=configs/digits.py", *flags)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "* train.num_steps 7 (default 1750000)" in lines and "model.ternary True" in lines
    assert "digits: 728,896 parameters (663,552 ternary, 0.4 MB packed)" in lines
    assert "1 x cpu, 1 process(es), mesh data=1, fsdp=1, tensor=1" in lines
    assert any(line.startswith("plan: ") for line in lines)
    assert "7 steps of 96 images from data/digits, learning rate 0.004, seed 0" in lines
    assert any(re.match(r"\| blocks/\S+ *\| \(4, ", line) for line in lines), "the table of parameters"
    assert f"parameters {4 * 728_896:,}" in lines and f"EMA {4 * 728_896:,}" in lines
    assert err == "" and not list(tmp_path.iterdir())


def test_what_cannot_run_is_refused_in_one_line():
    for flags, words in (
        (["--config=configs/digits.py", "--config.mesh.fsdp=3"], "does not multiply out to the 1 devices"),
        (["--config=configs/digits.py", "--config.model.num_heads=5"], "is not divisible by model.num_heads=5"),
        (["--config=configs/digits.py", "--config.train.init_labels=False"], "init_labels=False: is about"),
        ([], "--config and --workdir are both needed"),
    ):
        out, err = execute("main", *flags, "--print_config", status=2)
        assert out == "" and len(err.splitlines()) == 1 and words in err
