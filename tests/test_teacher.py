"""A teacher's term of the loss and its gradient, its place on a mesh, which models may be one, and runs with one."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.aot.collectives import read_collectives
from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.choices import MODES
from terdit_jax.config import RunConfig
from terdit_jax.config_sections import DiffusionConfig, MeshConfig
from terdit_jax.diffusion.objective import Ddpm, make_objective
from terdit_jax.errors import UserError
from terdit_jax.fast.plan import choose_plan
from terdit_jax.inference.teacher import abstract_teacher, check_teacher, load_teacher
from terdit_jax.interop.exports import export
from terdit_jax.interop.weights import open_weights
from terdit_jax.model.plan import PLAIN
from terdit_jax.model.transformer import forward, make_operands
from terdit_jax.parallel.mesh import make_mesh, single_device_mesh
from terdit_jax.parallel.sharding import batch_sharding, chip_bytes, tree_shardings
from terdit_jax.training.step import loss_and_grads
from terdit_jax.training.teacher import Teacher
from tests.deployed import describe, random_weights, weights_of
from tests.golden_models import DIT, assert_trees_close, random_params, tiny_config
from tests.runs import assert_same_run, execute, metrics_without_timing, prepare_digits, saved_run, train_arguments

STUDENT = tiny_config(num_heads=8, depth=2, alpha_init="least_squares")
TEACHERS = {
    "ternary": dataclasses.replace(STUDENT, depth=1, hidden_size=32, ffn_multiple_of=32),
    "full precision": tiny_config(num_heads=8, depth=1, hidden_size=32, ternary=False, **DIT),
}
BATCH = 16
WEIGHT = 0.7


def random_examples(objective, labels=11):
    rng = np.random.default_rng(5)
    x_0, noise = rng.standard_normal((2, BATCH, *STUDENT.sample_shape), np.float32)
    t = jax.vmap(objective.draw_t)(jax.random.split(jax.random.key(1), BATCH))
    y = np.arange(BATCH, dtype=np.int32) % labels  # some are dropped
    return {"x_0": x_0, "noise": noise, "t": t, "y": y, "x_t": objective.noised(x_0, t, noise)}


def taught_by(model, params):
    """The plain model as a teacher."""
    return Teacher(make_operands(model, params), jax.jit(lambda *inputs: forward(model, *inputs)), WEIGHT)


def jitted(model, objective, steps=1, plan=PLAIN):
    return jax.jit(lambda *inputs: loss_and_grads(model, objective, *inputs[:2], steps, plan, *inputs[2:]))


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_the_term_and_its_gradient(kind):
    """Against float64 on the host: the term, and its derivative by the student's prediction, pulled back to its
    parameters by the vjp of the forward pass alone. Only one of the two has channels for a variance in `flow`."""
    student = dataclasses.replace(STUDENT, depth=1, hidden_size=32, ffn_multiple_of=32, learn_sigma=kind == "ddpm")
    objective = make_objective(DiffusionConfig(kind), student.learn_sigma)
    params, examples = random_params(student), random_examples(objective)
    teacher = taught_by(model := TEACHERS["full precision"], random_params(model, 1))
    sums, grads = jitted(student, objective)(params, examples, teacher)
    plain_sums, plain_grads = jitted(student, objective)(params, examples)

    inputs = examples["x_t"], examples["t"], examples["y"]
    predict = jax.jit(lambda config, p: forward(config, make_operands(config, p), *inputs), static_argnums=0)
    out, pull_back = jax.vjp(lambda p: predict(student, p), params)
    taught = np.asarray(teacher.predict(teacher.operands, *inputs), np.float64)
    error = np.asarray(out, np.float64)[..., :4] - taught[..., :4]
    np.testing.assert_allclose(sums.pop("distillation"), np.mean(error**2), rtol=1e-6)
    for name in plain_sums:
        np.testing.assert_allclose(sums[name], plain_sums[name], rtol=1e-6, err_msg=f"{name} is of the data alone")

    cotangent = np.zeros(out.shape)
    cotangent[..., :4] = WEIGHT * 2 * error / error.size
    (of_term,) = pull_back(jnp.asarray(cotangent, jnp.float32))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_term))
    assert_trees_close(grads, jax.tree.map(jnp.add, plain_grads, of_term), 2e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_teacher_predicts_once_a_microbatch_and_is_never_differentiated(steps):
    """A callback has no derivative: JAX would refuse to take one."""
    calls = []

    def predict(operands, x_t, t, y):
        def on_host(operands, x_t, t, y):
            calls.append((len(x_t), y.tolist()))
            return operands["scale"] * x_t

        return jax.pure_callback(on_host, jax.ShapeDtypeStruct(x_t.shape, x_t.dtype), operands, x_t, t, y)

    student = dataclasses.replace(STUDENT, remat="block", depth=1)
    examples = random_examples(Ddpm())
    teacher = Teacher({"scale": jnp.float32(0.5)}, predict, WEIGHT)
    sums, _ = jitted(student, Ddpm(), steps)(random_params(student), examples, teacher)
    assert np.isfinite(sums["distillation"]) and [size for size, _ in calls] == [BATCH // steps] * steps
    seen = sorted(label for _, labels in calls for label in labels)
    assert seen == sorted(examples["y"].tolist()) and 10 in seen, "labels are those of the student, dropped ones too"


def run_of(teacher, mesh, student=STUDENT, latent_scale=1.0, **fields):
    """The part of a run's setup that finding its teacher takes."""
    model = {f"model.{name}": getattr(student, name) for name in ("input_size", "in_channels", "num_classes")}
    config = RunConfig().with_fields({
        "train.teacher": str(teacher), "train.teacher_weight": WEIGHT, "compute.dtype": "float32",
        "train.batch_size": BATCH, **model, **fields,
    })  # fmt: skip
    dataset = SimpleNamespace(metadata=SimpleNamespace(latent_scale=latent_scale))
    plan = choose_plan(student, mesh)
    return SimpleNamespace(config=config, mesh=mesh, model=student, plan=plan, dataset=dataset)


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_mesh_with_microbatches_and_remat_equals_one_device(tmp_path, kind):
    path = tmp_path / "teacher.safetensors"
    export(random_weights(TEACHERS[kind]), path, "packed" if kind == "ternary" else "safetensors")
    mesh, params, examples = make_mesh(MeshConfig(2, 2, 2)), random_params(STUDENT), random_examples(Ddpm())
    alone = load_teacher(run_of(path, single_device_mesh()))
    expected = jitted(STUDENT, Ddpm())(params, examples, alone)

    teacher = load_teacher(run_of(path, mesh))
    assert teacher.fingerprint == alone.fingerprint and len(teacher.fingerprint) == 64
    whole, cut = (sum(leaf.nbytes for leaf in jax.tree.leaves(alone.operands)), chip_bytes(teacher.operands))
    assert cut < 0.6 * whole, "its matrices are cut as the student's are"
    student = dataclasses.replace(STUDENT, remat="block")
    with jax.set_mesh(mesh):
        step = jitted(student, Ddpm(), 4, choose_plan(student, mesh))
        placed = jax.device_put(params, tree_shardings(params, mesh)), jax.device_put(examples, batch_sharding(mesh))
        actual = step(*placed, teacher)
    assert expected[0]["distillation"] > 0.01
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("ternary", [True, False])
def test_cut_matrices_are_gathered_one_layer_at_a_time(tmp_path, ternary):
    model = tiny_config(ternary=ternary, num_heads=8, depth=9, ffn_multiple_of=64)
    export(random_weights(model), path := tmp_path / "teacher.safetensors", "packed" if ternary else "safetensors")
    run, examples = run_of(path, make_mesh(MeshConfig(1, 8, 1))), random_examples(Ddpm())
    inputs = jax.device_put([examples[name] for name in ("x_t", "t", "y")], batch_sharding(run.mesh))
    with jax.set_mesh(run.mesh):
        predict = jax.jit(lambda teacher, inputs: teacher.predict(teacher.operands, *inputs))
        hlo = predict.lower(abstract_teacher(run.config, run.mesh), inputs).compile().as_text()
    gathers = [one for one in read_collectives(hlo) if one.kind == "all-gather"]
    assert sum(one.trips == model.depth for one in gathers) >= 4, "inside the scan"
    assert max(one.bytes for one in gathers) <= 4 * 6 * model.hidden_size * model.condition_width


def test_every_mode_of_a_ternary_teacher_predicts_what_it_stands_for(tmp_path):
    path, mesh = tmp_path / "teacher.safetensors", make_mesh(MeshConfig())
    export(random_weights(TEACHERS["ternary"]), path, "packed")
    examples = random_examples(Ddpm())
    inputs = examples["x_t"], examples["t"], examples["y"]
    predicted = {}
    for mode in MODES:
        teacher = load_teacher(run_of(path, mesh, **{"train.teacher_mode": mode}))
        with jax.set_mesh(mesh):
            predicted[mode] = np.asarray(jax.jit(lambda one: one.predict(one.operands, *inputs))(teacher))
    size = np.abs(predicted["plain"]).max()
    for mode, out in predicted.items():
        error = np.abs(out - predicted["plain"]).max() / size
        assert error < 1e-5 or mode in ("fast", "small") and 1e-4 < error < 0.2, mode


def test_modes_that_a_teacher_cannot_have_are_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    export(random_weights(TEACHERS["full precision"]), path, "safetensors")
    with pytest.raises(UserError, match=r"config.train.teacher=\S+: mode fast: is of ternary models"):
        load_teacher(run_of(path, make_mesh(MeshConfig()), **{"train.teacher_mode": "fast"}))
    with pytest.raises(UserError, match=r"config.train.teacher=\S+: mode exact: needs whole matrices on each device"):
        run = run_of(path, make_mesh(MeshConfig(1, 8)), **{"train.teacher_mode": "exact"})
        abstract_teacher(run.config, run.mesh)
    with pytest.raises(UserError, match=r"config.train.teacher=\S+: mesh axis tensor=8 does not divide the 2 kv heads"):
        export(random_weights(tiny_config(num_heads=2)), tmp_path / "few.safetensors", "packed")
        load_teacher(run_of(tmp_path / "few.safetensors", make_mesh(MeshConfig(1, 1, 8))))
    with pytest.raises(UserError, match=r"config.train.teacher=\S+: was trained on latents scaled by 1.0"):
        load_teacher(run_of(path, make_mesh(MeshConfig()), latent_scale=0.18215))


def test_zero_weight_is_no_teacher():
    """It is not even looked for."""
    run = run_of("/nowhere", make_mesh(MeshConfig()), **{"train.teacher_weight": 0.0})
    assert load_teacher(run) is None and abstract_teacher(run.config, run.mesh) is None


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ({}, {"diffusion": DiffusionConfig("flow")}, "has diffusion.objective=flow, the run has ddpm"),
        ({"input_size": 16}, {}, "has model.input_size=16, the run has 8"),
        ({"in_channels": 3}, {}, "has model.in_channels=3, the run has 4"),
        ({"num_classes": 9}, {}, "has model.num_classes=9, the run has 10"),
        ({"class_dropout_prob": 0.0}, {}, "knows no null class, the run has 0.1: give 0, or another teacher"),
        ({}, {"latent_scale": 0.5}, "scaled by 0.5, config.data.dir has 1.0"),
    ],
)
def test_what_a_teacher_must_have_in_common(model, fields, message):
    config = run_of("", make_mesh(MeshConfig())).config
    for kind in TEACHERS.values():
        check_teacher(config, describe(kind), 1.0)
    with pytest.raises(UserError, match=message):
        check_teacher(config, describe(dataclasses.replace(STUDENT, **model), **fields), 1.0)


def test_flows_must_follow_the_same_path_and_may_draw_t_otherwise():
    flow = {"diffusion.objective": "flow", "diffusion.path": "gvp", "model.learn_sigma": False}
    config = run_of("", make_mesh(MeshConfig()), **flow).config
    check_teacher(config, describe(STUDENT, diffusion=DiffusionConfig("flow", "gvp", "logit_normal", shift=3.0)))
    with pytest.raises(UserError, match="has diffusion.path=linear, the run has gvp"):
        check_teacher(config, describe(STUDENT, diffusion=DiffusionConfig("flow")))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A data set, two teachers in files, and a run that the first of them has taught."""
    root = tmp_path_factory.mktemp("taught")
    prepare_digits(root / "digits")
    model = tiny_config(ternary=False, in_channels=1, patch_size=4, hidden_size=32, depth=1, ffn_multiple_of=32)
    for seed in (0, 1):
        export(weights_of(model, random_params(model, seed)), root / f"full{seed}.safetensors", "safetensors")
    out, _ = execute("main", *arguments(root, "run"))
    assert f"teacher: {root / 'full0.safetensors'}, tiny after 7 steps, " in out and "  distillation " in out
    return root


def arguments(root, run, teacher="full0.safetensors", num_steps=16, **fields):
    fields = {"log__heldout_every": 0, "train__teacher_weight": WEIGHT, "train__num_steps": num_steps} | fields
    return train_arguments(root / "digits", root / run, **{"train__teacher": root / teacher} | fields)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_and_its_teacher_may_move(taught):
    """From within a window of the log, whose sums the state holds."""
    shutil.copytree(taught / "run", taught / "killed")
    for step in (12, 16):
        shutil.rmtree(taught / "killed" / "checkpoints" / str(step))
    shutil.copy(taught / "full0.safetensors", taught / "moved.safetensors")
    out, _ = execute("main", *arguments(taught, "killed", "moved.safetensors"))
    assert "changed configuration: config.train.teacher: " in out and "resuming at step 6" in out
    assert_same_run(taught / "killed", taught / "run")
    assert all(line["distillation"] > 0 for line in metrics_without_timing(taught / "run"))


@pytest.mark.slow
def test_a_run_and_its_exports_say_who_taught_it(taught, tmp_path):
    run = Checkpoints(taught / "run").newest_run()
    assert run["config"]["train"]["teacher"] == str(taught / "full0.safetensors")
    leaves = open_weights(taught / "run").description.provenance
    assert leaves["teacher"] == run["teacher"] and len(run["teacher"]) == 64
    export(open_weights(taught / "run"), tmp_path / "model.safetensors", "packed")
    assert open_weights(tmp_path / "model.safetensors").description.provenance == leaves


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "fields", "words"),
    [
        ("gone", {}, "does not exist: give a workdir, an artifact"),
        ("full1.safetensors", {}, "give those weights"),
        ("run", {"model__num_classes": 9}, "has 10 classes"),
    ],
)
def test_a_run_without_its_teacher_is_refused_in_one_line(taught, teacher, fields, words):
    before = sorted((taught / "run").rglob("*"))
    _, err = execute("main", *arguments(taught, "run", teacher, 20, **fields), status=2)
    (line,) = err.splitlines()
    assert line.startswith("error: ") and words in line
    assert sorted((taught / "run").rglob("*")) == before


@pytest.mark.slow
def test_a_new_run_with_no_teacher_to_be_found_leaves_nothing(taught):
    _, err = execute("main", *arguments(taught, "new", "gone"), status=2)
    assert err.startswith(f"error: config.train.teacher={taught / 'gone'}: ") and len(err.splitlines()) == 1
    assert not (taught / "new").exists()


@pytest.mark.slow
def test_zero_weight_equals_no_teacher_from_the_start_or_from_the_middle_on(taught):
    for name, fields in (("never", {"train__teacher": ""}), ("zero", {"train__teacher_weight": 0})):
        execute("main", *arguments(taught, name, "gone", **fields))
    never, zero = (saved_run(taught / name)[0] for name in ("never", "zero"))
    assert zero["window"]["sums"].pop("distillation") == 0
    jax.tree.map(np.testing.assert_array_equal, zero, never)
    assert metrics_without_timing(taught / "zero") == metrics_without_timing(taught / "never")

    shutil.copytree(taught / "run", taught / "weaned")
    out, _ = execute("main", *arguments(taught, "weaned", "gone", 20, train__teacher_weight=0))
    assert "config.train.teacher_weight: 0.7 -> 0.0" in out and "\nteacher: " not in out
    assert "distillation" not in metrics_without_timing(taught / "weaned")[-1]
    runs = [Checkpoints(taught / name).newest_run() for name in ("run", "weaned")]
    assert runs[0]["teacher"] == runs[1]["teacher"] and len(runs[1]["teacher"]) == 64
    out, _ = execute("main", *arguments(taught, "weaned", num_steps=24))
    assert metrics_without_timing(taught / "weaned")[-1]["distillation"] > 0


@pytest.mark.slow
def test_a_configuration_is_printed_with_its_teacher(taught):
    out, _ = execute("main", *arguments(taught, "new"), "--print_config")
    assert f"teacher: {taught / 'full0.safetensors'}, " in out and not (taught / "new").exists()
    (line,) = [line for line in out.splitlines() if line.split()[:1] == ["teacher"]]
    size = int(line.split()[1].replace(",", ""))
    assert 0.8 * size < (taught / "full0.safetensors").stat().st_size < 1.2 * size
