"""Every kind of damage is found before a checkpoint is used, and nothing is lost on the way."""

import itertools
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax.checkpoints.manifest import find_damage
from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.checkpoints.writer import CheckpointWriter
from terdit_jax.config_sections import CheckpointConfig
from terdit_jax.errors import UserError
from terdit_jax.interop.published import params_leaves
from terdit_jax.interop.weights import open_weights
from terdit_jax.parallel.mesh import AXES
from tests.deployed import make_workdir
from tests.faults.damages import DAMAGES, MANIFEST, half_write


def state(step):
    values = jnp.arange(64.0).reshape(8, 8) + step
    return {
        "step": jnp.int32(step),
        "params": {"w": values},
        "ema_params": {"w": values * 2},
        "opt_state": ({"mu": values * 3},),
        "skipped": {"total": jnp.int32(0)},
        "spikes": {"total": jnp.int32(0)},
        "window": {"sums": {"loss": jnp.float32(step)}},
    }


def target(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def open_checkpoints(workdir, **overrides):
    return CheckpointWriter(workdir, CheckpointConfig(**overrides))


@pytest.fixture
def saved(tmp_path):
    """A workdir with checkpoints 1, 2 and 3."""
    checkpoints = open_checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(state(step), {"step": step})
    checkpoints.close()
    return tmp_path


def restored_step(workdir):
    checkpoints = open_checkpoints(workdir)
    restored, run = checkpoints.restore(target(state(0)))
    jax.tree.map(np.testing.assert_array_equal, restored, state(run["step"]))
    checkpoints.close()
    return run["step"]


def flip(step):
    DAMAGES["flipped"](step)


def test_newest_state_comes_back(saved):
    assert restored_step(saved) == 3


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_falls_back_and_is_set_aside(saved, damage, caplog):
    damage(saved / "checkpoints" / "3")
    assert restored_step(saved) == 2
    assert "CHECKPOINT 3 IS DAMAGED" in caplog.text
    assert (saved / "damaged_checkpoints" / "3").exists()
    # Its number is free again: a continued run saves step 3 anew.
    checkpoints = open_checkpoints(saved)
    checkpoints.save(state(3), {"step": 3})
    checkpoints.close()
    assert restored_step(saved) == 3


def test_without_a_sound_checkpoint_nothing_is_moved(saved):
    for step in (1, 2, 3):
        flip(saved / "checkpoints" / str(step))
    for _ in range(2):
        with pytest.raises(UserError, match=r"no sound checkpoint among \[1, 2, 3\]"):
            open_checkpoints(saved).restore(target(state(0)))
    assert not (saved / "damaged_checkpoints").exists()


def test_a_half_written_step_is_ignored(saved):
    half_write(saved / "checkpoints" / "3")
    assert restored_step(saved) == 2
    assert not (saved / "damaged_checkpoints").exists(), "it never was a checkpoint"


def test_reading_sets_nothing_aside(saved):
    flip(saved / "checkpoints" / "3")
    wanted = {"ema_params": target(state(0))["ema_params"]}
    truncated = saved / "checkpoints" / "2" / "rest"
    largest_rest = max((p for p in truncated.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest_rest.unlink()
    found, run = Checkpoints(saved).restore(wanted)
    # Only what is read must be sound: the EMA of 3 is, though its raw weights are not.
    assert run["step"] == 3
    np.testing.assert_array_equal(found["ema_params"]["w"], state(3)["ema_params"]["w"])
    assert not (saved / "damaged_checkpoints").exists()


def test_other_shapes_dtypes_and_trees_are_refused(saved):
    for wanted in (
        {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
        {"w": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)},
        {"v": jax.ShapeDtypeStruct((8, 8), jnp.float32)},
    ):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = jax.tree.map(lambda s, p=sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), wanted)
        with pytest.raises(UserError):
            Checkpoints(saved).restore({"ema_params": wanted})
    assert restored_step(saved) == 3


def test_saved_on_one_mesh_and_restored_on_another(tmp_path):
    def spread(shape, tree, spec):
        mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
        matrix, scalar = (jax.sharding.NamedSharding(mesh, s) for s in (spec, jax.sharding.PartitionSpec()))
        return jax.tree.map(lambda leaf: jax.device_put(leaf, matrix if leaf.ndim else scalar), tree)

    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(spread((1, 8, 1), state(5), jax.sharding.PartitionSpec("fsdp")), {"step": 5})
    checkpoints.close()
    wanted = target(spread((2, 2, 2), state(0), jax.sharding.PartitionSpec("tensor", "fsdp")))
    restored, _ = Checkpoints(tmp_path).restore(wanted)
    jax.tree.map(np.testing.assert_array_equal, restored, state(5))
    assert restored["params"]["w"].sharding == wanted["params"]["w"].sharding


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep=2, keep_every=3)
    for step in range(1, 7):
        checkpoints.save(state(step), {"step": step})
    checkpoints.wait()
    assert checkpoints.steps() == [3, 5, 6]
    assert all(find_damage(tmp_path / "checkpoints" / str(s), ["params", "rest", "run"]) is None for s in (3, 5, 6))


def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use"):
        open_checkpoints(tmp_path / "file")


def leaf_of(workdir, item, step=None):
    run, read = Checkpoints(workdir).read_leaves(item, step)
    ((path, leaf),) = read(["w"])
    assert path == "w" and isinstance(leaf, np.ndarray)
    return run, leaf


@pytest.mark.parametrize("item", ["params", "ema_params"])
@pytest.mark.parametrize(("step", "found"), [(None, 3), (1, 1)])
def test_leaves_of_a_step(saved, item, step, found):
    run, leaf = leaf_of(saved, item, step)
    assert run == {"step": found}
    np.testing.assert_array_equal(leaf, state(found)[item]["w"])


def test_leaves_come_one_by_one_in_the_order_asked_for(tmp_path):
    tree = {"a": {"w": jnp.arange(24.0).reshape(2, 3, 4), "alpha": jnp.ones(2)}, "b": jnp.full((3,), 2, jnp.bfloat16)}
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(state(1) | {"params": tree}, {"step": 1})
    checkpoints.close()
    _, read = Checkpoints(tmp_path).read_leaves("params")
    for paths in (["b", "a/w", "a/alpha"], ["a/alpha", "b"], []):
        leaves = read(paths)
        assert iter(leaves) is leaves
        found = list(leaves)
        assert [path for path, _ in found] == paths
        for path, leaf in found:
            expected = tree["b"] if path == "b" else tree["a"][path[2:]]
            assert leaf.dtype == expected.dtype
            np.testing.assert_array_equal(leaf, expected)


def test_a_step_that_is_not_there(saved, tmp_path_factory):
    with pytest.raises(UserError, match=r"has no step 7: there are \[1, 2, 3\]$"):
        Checkpoints(saved).read_leaves("params", 7)
    empty_run = tmp_path_factory.mktemp("empty")
    open_checkpoints(empty_run).close()
    with pytest.raises(UserError, match="has no step 7: there are none$"):
        Checkpoints(empty_run).read_leaves("params", 7)
    with pytest.raises(UserError, match="holds no sound checkpoint: there are steps none$"):
        Checkpoints(empty_run).read_leaves("params")


def test_a_damaged_step_is_refused_if_asked_for_and_passed_over_if_not(saved, caplog):
    flip(saved / "checkpoints" / "3")
    with pytest.raises(
        UserError, match="checkpoint 3 of .* is damaged: params/.* does not match its SHA-256$"
    ) as caught:
        Checkpoints(saved).read_leaves("params", 3)
    assert "\n" not in str(caught.value)
    assert leaf_of(saved, "params")[0] == {"step": 2}
    assert "CHECKPOINT 3 IS DAMAGED" in caplog.text
    # What is not read may be damaged; nothing is set aside by reading.
    assert leaf_of(saved, "ema_params", 3)[0] == {"step": 3}
    assert not (saved / "damaged_checkpoints").exists()


def test_without_a_sound_step_there_are_no_leaves(saved):
    for step in (1, 2, 3):
        flip(saved / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"holds no sound checkpoint: there are steps \[1, 2, 3\]$"):
        Checkpoints(saved).read_leaves("params")


def restore_ema(workdir):
    """Step and some averaged weights, as `sample` and `export` read them: all would take as long as all the rest."""
    weights = open_weights(workdir)
    return weights.description.step, dict(itertools.islice(weights.leaves(), 3))


def restore_whole(workdir, wanted):
    """Step and the whole state, as a run reads it."""
    restored, run = Checkpoints(workdir).restore(wanted)
    assert int(restored["step"]) == run["step"]
    return run["step"], {name: dict(params_leaves(restored[name])) for name in ("params", "ema_params")}


def flip_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A workdir with checkpoints 1 and 2 of a model, and the leaves of their raw and averaged weights."""
    workdir = tmp_path_factory.mktemp("two_steps")
    saved = make_workdir(workdir)
    names = ("params", "ema_params")
    leaves = {
        step: {name: dict(params_leaves(params)) for name, params in zip(names, both, strict=True)}
        for step, both in saved.items()
    }
    raw, averaged = saved[2]
    empty = {"opt_state": {}, "skipped": {"total": jnp.int32(0)}, "spikes": {}, "window": {"sums": {}}}
    whole = {"step": jnp.int32(2), "params": raw, "ema_params": averaged, **empty}
    return workdir, leaves, target(jax.tree.map(jnp.asarray, whole))


@pytest.mark.parametrize("damage", [flip_middle, Path.unlink], ids=["flipped", "removed"])
def test_damage_to_any_file_gives_the_exact_weights_of_a_step_and_moves_nothing(two_steps, caplog, damage):
    workdir, leaves, whole = two_steps
    newest = workdir / "checkpoints" / "2"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {path.relative_to(newest).parts[0] for path in files} >= {"params", "ema_params", "rest", "run", MANIFEST}
    for path in files:
        name, content = path.relative_to(newest), path.read_bytes()
        if not content and damage is flip_middle:
            continue
        damage(path)
        before = sorted(workdir.rglob("*"))
        for read, items in (
            (lambda: restore_ema(workdir), ("ema_params", "run")),
            (lambda: restore_whole(workdir, whole), ("params", "ema_params", "rest", "run")),
        ):
            caplog.clear()
            step, found = read()
            expected = leaves[step]["ema_params"] if items[0] == "ema_params" else leaves[step]
            for name_of_leaf, leaf in found.items():
                jax.tree.map(np.testing.assert_array_equal, leaf, expected[name_of_leaf])
            loud = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
            if step == 1:
                assert len(loud) == 1 and loud[0].startswith("CHECKPOINT 2 IS DAMAGED ("), (name, loud)
            else:
                assert name.parts[0] not in items and not loud, (name, loud)
        assert sorted(workdir.rglob("*")) == before, name
        path.write_bytes(content)
    assert restore_ema(workdir)[0] == restore_whole(workdir, whole)[0] == 2
