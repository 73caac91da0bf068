"""The export command from its flags: what it says, what it writes, and that bad input is one line and nothing else."""

import dataclasses
from pathlib import Path
import shutil
from types import SimpleNamespace

from absl import flags
from absl.testing import flagsaver
import pytest

from terdit_jax import export as command
from terdit_jax.errors import UserError
from terdit_jax.interop.exports import export
from terdit_jax.interop.weights import open_weights
from tests.deployed import golden_weights, make_workdir, random_weights, small_config
from tests.golden_models import GOLDEN


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    make_workdir(path)
    return path


@pytest.fixture(scope="module")
def sources(workdir, tmp_path_factory):
    """Models that commands are pointed at, by name."""
    place = tmp_path_factory.mktemp("sources")
    export(golden_weights("terdit_tiny"), place / "packed.safetensors", "packed")
    export(random_weights(small_config(ternary=False)), place / "full.safetensors", "safetensors")
    shutil.copy(GOLDEN / "sit_tiny.safetensors", place / "bare.safetensors")
    (place / "empty").mkdir()
    (place / "noise.safetensors").write_bytes(bytes(range(256)) * 4)
    shutil.copy(GOLDEN / "sit_tiny.safetensors", place / "DiT-XL-2.safetensors")
    return {"run": workdir, **{path.stem: path for path in place.iterdir()}}


def run(*arguments):
    with flagsaver.flagsaver():
        flags.FLAGS(["export", *arguments])
        command.main(["export"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "tiny, step 2, averaged weights: "),
        (["--noema", "--step=1", "--compress"], "tiny, step 1, raw weights: "),
        (["--format=safetensors", "--masters"], "tiny, step 2, averaged weights: "),
    ],
)
def test_a_run_is_exported(workdir, tmp_path, capsys, options, said):
    output = tmp_path / "out.safetensors"
    run(f"--workdir={workdir}", f"--output={output}", *options)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{said}{output.stat().st_size / 1e6:,.1f} MB in {output}"
    weights = open_weights(output)
    assert weights.description.ema == ("averaged" in said) and weights.masters == ("--masters" in options)


def test_a_run_that_was_saved_without_names_of_classes_takes_those_of_its_data_set(monkeypatch):
    weights, fingerprint = random_weights(small_config(num_classes=2)), "a"
    run = {"config": {"data": {"dir": "data/pets"}}, "data_fingerprint": "a"}

    def read_metadata(path):
        if path != "data/pets":
            raise UserError("no data set")
        return SimpleNamespace(fingerprint=fingerprint, class_names=("cat", "dog"))

    monkeypatch.setattr("terdit_jax.data.schema.read_metadata", read_metadata)
    named = command._with_class_names(weights, run)
    assert named.description == dataclasses.replace(weights.description, class_names=("cat", "dog"))
    assert command._with_class_names(weights, run | {"config": {"data": {"dir": "data/gone"}}}) is weights
    assert command._with_class_names(weights, run | {"config": None}) is weights
    fingerprint = "b"  # another data set is there now
    assert command._with_class_names(weights, run) is weights


def test_a_torch_folder_is_remarked_upon(sources, tmp_path, capsys):
    pytest.importorskip("torch")
    run(f"--model={sources['packed']}", "--format=torch", f"--output={tmp_path / 'out'}")
    remark, last = capsys.readouterr().out.splitlines()
    assert remark.startswith("note: the public sampler") and last.endswith(f"MB in {tmp_path / 'out'}")
    assert open_weights(tmp_path / "out").description == open_weights(sources["packed"]).description


def test_a_folder_is_pushed_with_its_scores(workdir, hub, capsys):
    Path("scores.json").write_text('{"fid": 12.5}')
    options = ["--format=hub", "--scores=scores.json", "--license=mit", "--push_to=me/tiny"]
    run(f"--workdir={workdir}", "--output=out", *options)
    written, pushed = capsys.readouterr().out.splitlines()
    assert written.endswith("MB in out") and pushed == "pushed to https://hub/me/tiny"
    card = (hub.folder / "me/tiny/README.md").read_text()
    assert "\nlicense: mit\n" in card and "| `fid` | 12.5000 |" in card and 'load_model("me/tiny")' in card
    assert open_weights("me/tiny").description == open_weights("out").description == open_weights(workdir).description
    hub.fails = ConnectionError("refused")
    with pytest.raises(UserError, match="^again is written, but was not pushed to me/tiny: .* hf upload me/tiny again"):
        run(f"--workdir={workdir}", "--output=again", *options)
    assert {path.name for path in Path("again").iterdir()} == {path.name for path in Path("out").iterdir()}


@pytest.mark.parametrize("source", ["run", "packed", "full"])
def test_the_report_writes_nothing(sources, tmp_path, capsys, source):
    path = sources[source]
    run(f"--workdir={path}" if source == "run" else f"--model={path}", "--report")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["part", "parameters"] and lines[7].startswith("total")
    assert len(lines) == (8 if source == "run" else 9)
    assert source == "run" or lines[8] == f"this file: {path.stat().st_size / 1e3:,.1f} kB" or "MB" in lines[8]
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_sit_is_exported_and_measured(sources, tmp_path, capsys):
    source = (f"--model={sources['bare']}", "--num_heads=4", "--objective=flow")
    output = tmp_path / "out.safetensors"
    run(*source, "--format=safetensors", f"--output={output}")
    assert capsys.readouterr().out.startswith("bare, averaged weights: 0.7 MB in ")
    description = open_weights(output).description
    assert (description.model.num_heads, description.diffusion.objective) == (4, "flow")
    run(*source, "--report")
    total, file = capsys.readouterr().out.splitlines()[-2:]
    assert total.split()[:3] == ["total", "182,176", "0.0%"] and file == "this file: 0.7 MB"


BAD = {
    "neither source": ([], "give either --workdir .* or --model"),
    "both sources": (["--workdir={run}", "--model={packed}"], "give either --workdir .* or --model"),
    "no output": (["--model={packed}", "--output="], "--output=: is empty, give a path or leave it out"),
    "a report to a file": (["--model={packed}", "--report"], "--report writes nothing: leave out --output"),
    "no run": (["--workdir={empty}"], "--workdir=.*empty holds no run"),
    "an artifact for a run": (["--workdir={packed}"], "--workdir=.*packed.safetensors holds no run"),
    "an empty folder": (["--model={empty}"], "holds neither a run's checkpoints/ nor consolidated.*there is nothing"),
    "nothing there": (["--model={empty}/nowhere"], "nowhere does not exist"),
    "noise": (["--model={noise}"], "noise.safetensors: not a safetensors file"),
    "no such step": (["--workdir={run}", "--step=9"], r"has no step 9: there are \[1, 2\]"),
    "a step of a file": (["--model={packed}", "--step=1"], "step 1 was asked for, but .* is no workdir"),
    "packing full precision": (["--model={full}"], "full.safetensors is full precision, nothing to pack"),
    "packing masters": (["--workdir={run}", "--masters"], "--masters: a packed artifact holds ternary weights"),
    "masters of a packed source": (["--model={packed}", "--masters", "--format=safetensors"], "no master weights"),
    **{
        f"compressing {kind}": (["--workdir={run}", "--compress", f"--format={kind}"], "--compress: only")
        for kind in ("torch", "safetensors", "hub")
    },
    **{
        f"{flag} of another format": (["--workdir={run}", flag], f"{flag}: takes no part without --format=hub")
        for flag in ("--push_to=a/b", "--scores=a.json", "--license=mit")
    },
    "no repository": (["--workdir={run}", "--format=hub", "--push_to=digits"], "must be ORGANISATION/NAME"),
    "no scores": (["--workdir={run}", "--format=hub", "--scores={empty}/a"], "--scores=.*/a: cannot be read"),
    "no licence": (["--workdir={run}", "--format=hub", "--license=My own"], "--license=My own: give one as the Hub"),
    "masters of a packed source, for the Hub": (["--model={packed}", "--masters", "--format=hub"], "no master weights"),
    "packing a SiT": (
        ["--model={bare}", "--num_heads=4", "--objective=flow"],
        "bare.safetensors is full precision, nothing to pack",
    ),
    "heads and objective unknown": (["--model={bare}"], "bare.safetensors: give .*--num_heads .*, --objective=ddpm"),
    "heads unknown": (["--model={bare}", "--objective=flow"], "bare.safetensors: give .*--num_heads "),
    "objective unknown": (["--model={bare}", "--num_heads=4"], "bare.safetensors: give .*--objective=ddpm for DiT"),
    "heads of no model": (["--model={bare}", "--num_heads=5", "--objective=flow"], "bare.safetensors: makes no model"),
    "another objective": (
        ["--model={DiT-XL-2}", "--num_heads=4", "--objective=flow"],
        "has objective=ddpm, but objective=flow was given",
    ),
    "other heads of an artifact": (["--model={packed}", "--num_heads=8"], "has num_heads=4, but num_heads=8 was given"),
    "other heads of a run": (["--workdir={run}", "--num_heads=8"], "has num_heads=2, but num_heads=8 was given"),
    "what is there": (["--model={packed}", "--output={full}"], "--output=.*full.safetensors: exists already"),
    "a file's inside": (["--model={packed}", "--output={full}/x"], "full.safetensors takes no files .Not a directory"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_writes_nothing(sources, tmp_path, capsys, arguments, message):
    given = [argument.format_map(sources) for argument in arguments]
    with pytest.raises(UserError, match=message) as caught:
        run(f"--output={tmp_path / 'out'}", *given)
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())
