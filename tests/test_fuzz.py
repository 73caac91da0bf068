"""A few hundred damaged and forged files do no harm, and the fuzzer that says so notices when they do."""

import contextlib
import dataclasses
from pathlib import Path
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest

from terdit_jax.errors import UserError
from tests import fuzz_files, fuzz_judge
from tests.fuzz_data import DataFuzzer
from tests.fuzz_files import Fuzzer, Loader, Outcome, damage


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    fuzzer = Fuzzer(seed=7, folder=tmp_path_factory.mktemp("fuzz") / "case", large=False)
    yield fuzzer
    fuzzer.close()


def test_damaged_and_forged_files_do_no_harm(fuzzer):
    outcomes = [fuzzer.run(number) for number in range(200)]
    assert [outcome for outcome in outcomes if outcome.result == "FAILED"] == []
    assert {outcome.result for outcome in outcomes} == {"refused", "loaded"}
    assert len({outcome.kind for outcome in outcomes}) == 4
    assert len({outcome.mutation for outcome in outcomes}) > 20


@pytest.fixture(scope="module")
def data_fuzzer(tmp_path_factory):
    fuzzer = DataFuzzer(seed=7, folder=tmp_path_factory.mktemp("fuzz") / "case")
    yield fuzzer
    fuzzer.close()


def test_damaged_and_forged_data_does_no_harm(data_fuzzer):
    outcomes = [data_fuzzer.run(number) for number in range(300)]
    assert [outcome for outcome in outcomes if outcome.result == "FAILED"] == []
    assert {outcome.result for outcome in outcomes} == {"refused", "loaded"}
    assert {outcome.kind for outcome in outcomes} == set(data_fuzzer.digests)
    assert len({outcome.mutation for outcome in outcomes}) > 20


def test_a_case_follows_from_its_number(fuzzer, data_fuzzer):
    assert fuzzer.run(3) == fuzzer.run(3) and data_fuzzer.run(3) == data_fuzzer.run(3)
    assert len({fuzzer.run(number) for number in range(5)}) > 1


@pytest.mark.parametrize("kind", fuzz_files.BLIND)
def test_damage_always_changes_something(kind):
    content = bytes(range(200))
    assert all(damage(kind, content, np.random.default_rng(seed)) != content for seed in range(50))


def failures(fuzzer, count):
    """Messages of the cases that fail, one at a time."""
    return (outcome.message for outcome in map(fuzzer.run, range(count)) if outcome.result == "FAILED")


def test_a_checksum_that_is_not_looked_at_is_noticed(fuzzer, monkeypatch):
    monkeypatch.setattr("terdit_jax.interop.weights.is_artifact", lambda container: False)
    assert any("it loaded, where only 'refused' is sound" in message for message in failures(fuzzer, 200))


def test_codes_that_stand_for_nothing_are_noticed(fuzzer, monkeypatch):
    monkeypatch.setattr("terdit_jax.interop.published.holds_unused_code", lambda planes: False)
    assert any("it loaded" in message for message in failures(fuzzer, 400))


def test_a_class_that_is_imported_is_noticed(data_fuzzer, monkeypatch):
    monkeypatch.setattr("terdit_jax.data.tfds_source._own_features_only", contextlib.nullcontext)
    assert any("ran code" in message for message in failures(data_fuzzer, 400))


def test_a_manifest_that_is_not_looked_at_is_noticed(data_fuzzer, monkeypatch):
    workdir = next(fmt for fmt in data_fuzzer._formats if fmt.kind == "workdir")
    described = dataclasses.replace(workdir, victims=("checkpoints/1/run/metadata",))
    monkeypatch.setattr(data_fuzzer, "_formats", [described])
    monkeypatch.setattr(data_fuzzer, "_shares", np.ones(1))
    monkeypatch.setattr("terdit_jax.checkpoints.reader.find_damage", lambda step, items: None)
    assert any("it loaded, where only 'same' is sound" in message for message in failures(data_fuzzer, 100))


def _raise(error):
    def load(path):
        raise error

    return load


def _run_code(path):
    Path(fuzz_judge.SENTINEL).touch()
    raise UserError("refused, but too late")


def _allocate(path):
    np.ones(1 << 23)
    raise UserError("refused, but too late")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (_raise(KeyError("x")), "KeyError"),
        (_raise(MemoryError()), "MemoryError"),
        (_raise(RecursionError()), "RecursionError"),
        (_raise(UserError("long " * 200)), "long"),
        (lambda path: warnings.warn("careful", stacklevel=1), "careful"),
        (_run_code, "ran code"),
        (_allocate, "bytes of memory"),
    ],
)
def test_what_a_loader_must_not_do_is_noticed(fuzzer, monkeypatch, load, message):
    monkeypatch.setattr(fuzz_files, "open_weights", load)
    messages = list(failures(fuzzer, 5))
    assert len(messages) == 5
    assert all(message in each for each in messages)


def test_a_slow_loader_is_noticed(fuzzer, monkeypatch):
    monkeypatch.setattr(fuzz_judge, "SECONDS", 0)
    messages = list(failures(fuzzer, 5))
    assert len(messages) == 5
    assert all(re.search(r"took \d+\.\d s", message) for message in messages)


@pytest.mark.parametrize(
    ("second", "status"),
    [(Outcome("artifact", "bits", "refused", "no"), 0), (Outcome("artifact", "bits", "FAILED", "why"), 1), (None, 1)],
)
def test_the_command_fails_with_the_case_that_did(monkeypatch, tmp_path, capsys, second, status):
    class FakeLoader:
        peaks = {"artifact": 1}

        def __init__(self, kinds, seed, folder):
            self.folder = folder

        def run(self, number):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "file").write_text(str(number))
            return second if number == 6 else Outcome("artifact", "bits", "refused", "no")

        def close(self):
            pass

    monkeypatch.setattr(fuzz_files, "Loader", FakeLoader)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    keep = tmp_path / "keep"
    assert fuzz_files.main(["--runs=3", "--first=5", "--seed=9", "--kinds=models", f"--keep={keep}"]) == status
    printed = capsys.readouterr().out
    assert re.search(r"^all +3 ", printed, re.MULTILINE)
    assert ("--kinds=models --seed=9 --first=6 --runs=1" in printed) == bool(status)
    assert keep.exists() == bool(status)
    if status:
        assert (keep / "models" / "6" / "file").read_text() == "6"


@pytest.mark.slow
def test_a_process_that_dies_is_an_outcome(tmp_path):
    loader = Loader("models", 0, tmp_path / "case")
    assert loader.run(0).result in ("refused", "loaded")
    loader._process.kill()
    loader._process.join()
    assert loader.run(1) is None


@pytest.mark.slow
def test_the_command_runs():
    command = [sys.executable, "-m", "tests.fuzz_files", "--runs=30"]
    root = Path(fuzz_files.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^all +30 ", done.stdout, re.MULTILINE)
