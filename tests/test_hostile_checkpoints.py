"""Checkpoints whose manifest was signed anew over other content: what they hold or one line, never a traceback."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from terdit_jax.checkpoints.best import BestCheckpoint
from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.config import RunConfig
from terdit_jax.errors import UserError
from terdit_jax.interop.weights import open_weights
from terdit_jax.training.resume import check_resumable, data_dir
from tests.data_formats import read_folder
from tests.deployed import make_workdir
from tests.forged_data import sign_checkpoint

RUN = "checkpoints/1/run/metadata"
JUNK = [None, True, -1, 2.5, "x", "\x1b[2J", [], {}, [[]] * 3, 1 << 70, 1e999, "x" * 10_000]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "run"
    make_workdir(path, steps=(1,), hidden_size=16, depth=1, ffn_multiple_of=16)
    return path


@pytest.fixture
def workdir(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def forge(workdir, name, content):
    """Puts content in the place of a file and signs the manifest anew."""
    (workdir / name).write_bytes(content)
    files = read_folder(workdir)
    sign_checkpoint(files)
    (workdir / "checkpoints/1/sha256.json").write_bytes(files["checkpoints/1/sha256.json"])


def forge_run(workdir, **changes):
    run = json.loads((workdir / RUN).read_text())
    for path, value in changes.items():
        *parents, name = path.split("__")
        functools.reduce(dict.__getitem__, parents, run)[name] = value
    forge(workdir, RUN, json.dumps(run).encode("utf-8", errors="surrogatepass"))


def read(workdir):
    weights = open_weights(workdir)
    return weights.description, list(weights.leaves())


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text.isprintable() and len(text.replace(str(arguments[0]), "")) < 700
    return text


def test_a_signature_is_all_that_a_forger_needs(workdir):
    forge_run(workdir, config__name="forged")
    assert read(workdir)[0].name == "forged"


@pytest.mark.parametrize("value", JUNK, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("field", ["config", "config__model", "config__sample", "config__name", "latent_scale", "seed"])
def test_a_run_of_the_wrong_types_is_refused(workdir, field, value):
    if (field, value) in (("config__name", "x"), ("config__sample", {}), ("latent_scale", 2.5), ("seed", -1)):
        pytest.skip("that is one")
    if field == "seed" and value == 1 << 70 or field in ("config__model", "config__sample") and value in ([], {}):
        pytest.skip("it changes nothing that is read")
    forge_run(workdir, **{field: value})
    refusal(read, workdir)


@pytest.mark.parametrize(
    "change",
    [
        {"config__model__hidden_size": 32}, {"config__model__hidden_size": 1 << 40}, {"config__model__depth": 2},
        {"config__model__num_heads": 0}, {"config__model__input_size": 1 << 19},
        {"config__model__num_classes": 11}, {"config__model__unknown": 1}, {"config__sample__num_steps": "many"},
        {"step": -1}, {"step": "1"}, {"codec": "a\nb"}, {"latent_scale": 1e-300}, {"latent_scale": -1},
        {"data_fingerprint": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_run_that_is_not_that_of_the_weights_is_refused(workdir, change):
    forge_run(workdir, **change)
    refusal(read, workdir)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{}", b"3", b"{", b"\xff", b"[" * 10**5], ids=lambda c: repr(c[:8])
)
@pytest.mark.parametrize("name", [RUN, "checkpoints/1/ema_params/_METADATA", "checkpoints/1/ema_params/manifest.ocdbt"])
def test_files_that_are_something_else_are_refused(workdir, name, content):
    forge(workdir, name, content)
    refusal(read, workdir)


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"{", b"\xff" * 100])
def test_what_orbax_writes_for_itself_is_not_needed(workdir, sound, content):
    forge(workdir, "checkpoints/1/_CHECKPOINT_METADATA", content)
    assert read(workdir)[0] == read(sound)[0]


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../outside", "ema_params/../../../outside", "ema_params/../run/metadata"]
)
def test_a_manifest_names_nothing_outside(workdir, name):
    manifest = workdir / "checkpoints/1/sha256.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {name: "0" * 64}))
    if name.startswith("ema_params"):
        refusal(read, workdir)
    else:
        read(workdir)  # names of no item are passed over


@pytest.mark.parametrize("value", JUNK, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("field", ["config", "config__data", "config__data__dir", "data_fingerprint"])
def test_training_goes_on_from_no_such_run(workdir, field, value):
    forge_run(workdir, **{field: value})
    run = Checkpoints(workdir).newest_run()

    def resume(workdir):
        check_resumable(run, RunConfig(), "0" * 64, str(workdir))

    refusal(resume, workdir)
    if not isinstance(value, str) and field != "data_fingerprint":
        refusal(lambda workdir: data_dir(run, str(workdir)), workdir)


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: c[::-1]], ids=["cut off", "reversed"])
def test_every_file_of_the_weights_may_be_damaged_and_signed(workdir, damage):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = dict(read(workdir)[1])
    tree = {}
    for path, leaf in target.items():
        *parents, name = path.split("/")
        branch = functools.reduce(lambda tree, parent: tree.setdefault(parent, {}), parents, tree)
        branch[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    for name, content in read_folder(workdir).items():
        if not name.startswith("checkpoints/1/ema_params/"):
            continue
        forge(workdir, name, damage(content))
        for call in (lambda: read(workdir), lambda: Checkpoints(workdir).restore({"ema_params": tree})):
            try:
                call()
            except UserError as error:
                assert str(error).isprintable() and len(str(error)) < 700
        forge(workdir, name, content)


@pytest.mark.parametrize("loss", [None, True, "0", float("nan"), [1.0]], ids=repr)
def test_a_best_score_that_is_none_is_forgotten(tmp_path, loss):
    params = {"x": np.ones(3, np.float32)}
    best = BestCheckpoint(tmp_path, 0)
    assert best.offer(params, {"step": 1}, 0.5)
    best.close()
    folder = tmp_path / "best"
    run = json.loads((folder / RUN).read_text())
    forge(folder, RUN, json.dumps(run | {"loss": loss}).encode())
    best = BestCheckpoint(tmp_path, 1)
    assert best.offer(params, {"step": 2}, 0.9)
    best.close()
