"""Compiled programs are kept and found again, bounded, and where it is safe; no trouble with them ends a command."""

from functools import partial
import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import numpy as np
import pytest

from terdit_jax import programs
from terdit_jax.errors import UserError
from terdit_jax.inference.runtime import load_model
from terdit_jax.interop.exports import export
from terdit_jax.programs import default_folder, keep_programs
from tests.deployed import random_weights, small_config
from tests.runs import execute, finish, start

SETTINGS = (
    "enable_compilation_cache", "compilation_cache_dir", "compilation_cache_max_size",
    "persistent_cache_min_compile_time_secs", "persistent_cache_enable_xla_caches",
)  # fmt: skip
X = np.arange(12.0, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The default place, empty, in a process that has no other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield default_folder()
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def compiled():
    """The names of what XLA has compiled, or found, since the test began, and how often it found something."""
    names, hits = [], []

    def of_duration(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            names.append(fun_name)

    def of_event(event, **_):
        if event.endswith("/cache_hits"):
            hits.append(event)

    jax.monitoring.register_event_duration_secs_listener(of_duration)
    jax.monitoring.register_event_listener(of_event)
    yield names, hits
    jax.monitoring.unregister_event_duration_listener(of_duration)
    jax.monitoring.unregister_event_listener(of_event)


def compute() -> bytes:
    """Compiles a program, as a process that knows none, and returns the bits of what it computes."""
    jax.clear_caches()
    return np.asarray(jax.jit(lambda x: jnp.tanh(x @ x.T) / 3)(X)).tobytes()


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*-cache")}


def keep_all() -> None:
    keep_programs("", "--compilation_cache")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def test_a_program_is_found_again_and_computes_the_same_bits(folder, compiled, capfd):
    expected = compute()
    keep_all()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert compute() == expected and len(kept(folder)) == 1 and not compiled[1]
    assert compute() == expected and len(kept(folder)) == 1 and len(compiled[1]) == 1
    assert capfd.readouterr().err == ""


def test_garbage_is_no_reason_for_a_word(folder, compiled, recwarn, capfd):
    keep_all()
    expected, (name,) = compute(), kept(folder)
    (folder / name).write_bytes(b"garbage")
    assert compute() == expected and not compiled[1]
    whole = (folder / name).read_bytes()[:100]
    (folder / name).write_bytes(whole)
    assert compute() == expected and not compiled[1]
    assert not recwarn.list and capfd.readouterr().err == ""


def test_what_a_killed_writer_has_left_goes_and_the_rest_stays(folder):
    keep_all()
    compute()
    (name,) = kept(folder)
    (folder / "torn-cache").write_bytes(b"half")
    (folder / "empty-cache").touch()
    for time in ("empty-atime", "evicted-atime"):
        (folder / time).write_bytes(bytes(8))
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    keep_all()
    assert kept(folder) == {name} and len(list(folder.glob("*-atime"))) == 1
    jax.jit(lambda x: x.T @ x)(X)
    assert len(kept(folder)) == 2  # which JAX would not have kept beside the torn one


def test_the_last_used_stay(folder, monkeypatch):
    folder.mkdir(parents=True, mode=0o700)
    for age, name in enumerate("cadb"):
        (folder / f"{name}-cache").write_bytes(b"program")
        (folder / f"{name}-atime").write_bytes(bytes(8))
        os.utime(folder / f"{name}-atime", (1e9 - age, 1e9 - age))
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    keep_programs(None, "--compilation_cache")
    assert kept(folder) == {"a-cache", "c-cache"} and len(list(folder.glob("*-atime"))) == 2


def test_jax_evicts_beyond_the_bound(folder, monkeypatch):
    monkeypatch.setattr(programs, "MAX_BYTES", 10_000)
    keep_all()
    for n in range(1, 6):
        jax.jit(partial(jnp.multiply, n * X))(X)
    sizes = [path.stat().st_size for path in folder.glob("*-cache")]
    assert sum(sizes) <= 10_000 and 1 <= len(sizes) < 5


@pytest.mark.parametrize("trouble", ["a file", "of others", "full"])
def test_an_unfit_folder_costs_one_line(folder, monkeypatch, trouble, capfd):
    if trouble == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", __file__)
    elif trouble == "of others":
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    else:
        folder.mkdir(parents=True, mode=0o700)
        (folder / ".trial").symlink_to("/dev/full")
    keep_programs("", "--compilation_cache")
    err = capfd.readouterr().err
    assert err.startswith("compiled programs are not kept (") and err.count("\n") == 1
    assert err.endswith("): name another folder, or off, with --compilation_cache\n")
    assert jax.config.jax_compilation_cache_dir is None
    compute()
    assert not folder.is_dir() or not kept(folder)


def test_off_a_place_given_and_that_of_the_variable(folder, tmp_path):
    with pytest.raises(UserError, match=f"^field={__file__}: is no folder"):
        keep_programs(__file__, "field")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of the variable"))
    keep_programs("", "field")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "of the variable")
    keep_programs(str(tmp_path / "given"), "field")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "given")
    keep_programs("off", "field")
    compute()
    assert not list(tmp_path.iterdir())


def test_several_processes_of_a_run_keep_none_by_default(folder, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    keep_programs("", "field")
    assert jax.config.jax_compilation_cache_dir is None and not folder.exists()


def test_machines_that_share_a_home_share_no_programs(folder, monkeypatch):
    assert default_folder() == folder
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(1000), raising=False)
    assert default_folder() != folder and default_folder().parent == folder.parent
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification has ignored
    assert default_folder().is_relative_to(Path.home() / ".cache")


@pytest.mark.parametrize("mode", ["auto", "fast"])
def test_one_program_for_all_seeds_compiled_while_weights_are_read(tmp_path, compiled, mode):
    export(random_weights(small_config(depth=1)), tmp_path / "tiny.safetensors", "packed")
    labels, draws = np.arange(3), lambda: [name for name in compiled[0] if "draw" in name]
    ahead = lambda model: model.compile_draw(3, num_steps=2)  # noqa: E731
    model = load_model(tmp_path / "tiny.safetensors", mode=mode, meanwhile=ahead)
    assert len(draws()) == 1
    drawn = [model.draw(labels, num_steps=2, seed=seed) for seed in (0, 1, 2**32 - 1, 2**40 + 7)]
    assert len(draws()) == 1
    assert len({images.tobytes() for images in drawn}) == len(drawn)


@pytest.mark.slow
def test_a_set_compiles_one_program_and_two_commands_may_keep_it_at_once(tmp_path):
    """The last shard of 1,100 images has fewer than a batch."""
    export(random_weights(small_config(depth=1, in_channels=1)), tmp_path / "tiny.safetensors", "packed")
    own = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_LOG_COMPILES": "1"}
    arguments = [f"--model={tmp_path}/tiny.safetensors", "--num_samples=1100", "--num_steps=2", "--batch_size=100"]
    both = [
        start("sample", *arguments, f"--output={tmp_path}/{name}.npz", cache=tmp_path, environment=own) for name in "ab"
    ]
    for process in both:
        out, err = finish(process)
        assert err.count("Finished XLA compilation of jit(draw)") == 1, err
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab")
    np.testing.assert_array_equal(a, b)
    assert list(tmp_path.glob("cache/terdit_jax/programs/*/*-atime"))
    _, err = execute("sample", *arguments, f"--output={tmp_path}/c.npz", "--seed=1", environment=own)
    assert "Persistent compilation cache hit for 'jit_draw'" in err
