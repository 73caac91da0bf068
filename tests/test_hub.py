"""A name on the Hub is what its files say, fetched no further than needed; what is on this machine goes before it."""

from pathlib import Path
import sys

import pytest
from safetensors.numpy import load_file

from terdit_jax.errors import UserError
from terdit_jax.interop.exports import export
from terdit_jax.interop.hub import check_push, is_name, push
from terdit_jax.interop.weights import HUB_WEIGHTS, MODEL_ARGS, consolidated_name, is_model, open_weights
from tests.deployed import assert_same_leaves, random_weights, small_config
from tests.golden_models import GOLDEN
from tests.torch_files import save_state_dict

NAME = "someone/tiny"


@pytest.fixture
def tiny(hub):
    """Weights that are on the Hub as someone/tiny."""
    weights = random_weights(small_config())
    export(weights, hub.folder / NAME, "hub")
    return open_weights(hub.folder / NAME)


@pytest.mark.parametrize("end", ["", "@main", "/", f"/{HUB_WEIGHTS}", f"@main/{HUB_WEIGHTS}"])
def test_a_name_is_opened_as_its_folder_would_be(hub, tiny, end):
    found = open_weights(f"{NAME}{end}")
    assert found.description == tiny.description
    assert_same_leaves(found, tiny)
    assert hub.asked == [(NAME, HUB_WEIGHTS, "main" if "@" in end else None)]


@pytest.mark.parametrize("name", [NAME, f"{NAME}/{HUB_WEIGHTS}"])
def test_without_a_network_what_was_fetched_is_opened(hub, tiny, name):
    open_weights(NAME)
    hub.fails = ConnectionError("Name or service not known")
    assert_same_leaves(open_weights(name), tiny)


def test_a_local_path_goes_before_a_name(hub, tiny):
    export(random_weights(small_config(depth=1)), NAME, "packed")
    assert open_weights(NAME).model.depth == 1 and hub.asked == []
    with pytest.raises(UserError, match=f"^{NAME}/none does not exist here, and the Hugging Face Hub does not"):
        hub.fails = ConnectionError()
        open_weights(f"{NAME}/none")


def test_of_several_models_a_folder_or_a_file_is_named(hub):
    pytest.importorskip("torch")
    weights = random_weights(small_config())
    export(weights, hub.folder / "lab/models/600M", "torch")
    (hub.folder / "lab/models/more").mkdir()
    save_state_dict(load_file(GOLDEN / "sit_tiny.safetensors"), hub.folder / "lab/models/more/SiT-XL-2-256.pt")
    (hub.folder / "lab/models/README.md").touch()
    assert open_weights("lab/models/600M").description == weights.description
    files = [consolidated_name(True, True), MODEL_ARGS]
    assert hub.asked == [("lab/models", f"600M/{file}", None) for file in files]
    for name in ("lab/models/more", "lab/models/more/SiT-XL-2-256.pt"):
        assert open_weights(name, num_heads=4).description.diffusion.objective == "flow"
    with pytest.raises(UserError, match="^lab/models holds neither .* is 600M, README.md, more: give lab/models/NAME"):
        open_weights("lab/models")
    with pytest.raises(UserError, match="^lab/models/7B: lab/models has no 7B on the Hugging Face Hub"):
        open_weights("lab/models/7B")


@pytest.mark.parametrize(
    "failure", [OSError("401 Client Error.\n\nUnauthorized"), KeyError(), ConnectionError("x" * 999)]
)
def test_what_the_hub_does_not_give_is_one_line(hub, failure):
    with pytest.raises(UserError, match=f"^{NAME} does not exist here, .* Hub does not give it.*RepositoryNotFoundE"):
        open_weights(NAME)
    (hub.folder / NAME).mkdir(parents=True)
    with pytest.raises(UserError, match="^someone/tiny: someone/tiny has no files"):
        open_weights(NAME)
    with pytest.raises(UserError, match="does not give it: .*RevisionNotFoundError: 404 Client Error"):
        open_weights(f"{NAME}@v1")
    hub.fails = failure
    with pytest.raises(UserError, match=f"does not give it: check the name and the network.*{type(failure).__name__}"):
        open_weights(NAME)


@pytest.mark.parametrize(
    "path", ["model", "/a/b", "./a/b", "../a/b", "~/a", "a/", "a/.b", "a b/c", "a/b/../c", "gs://a/b"]
)
def test_what_is_no_name_is_not_asked_for(hub, path):
    assert not is_name(path)
    if path and "gs" not in path:
        with pytest.raises(UserError, match="does not exist: give a workdir|holds neither"):
            open_weights(path)


@pytest.mark.parametrize(
    ("path", "model"),
    [
        (NAME, True), ("model.safetensors", True), ("folder", True), ("run", True),
        (f"{NAME}.npz", False), ("pictures", False), ("nothing", False),
    ],
)  # fmt: skip
def test_what_is_a_model_is_told_from_images(tmp_path, monkeypatch, path, model):
    monkeypatch.chdir(tmp_path)
    for name in ("run/checkpoints/1", f"folder/{HUB_WEIGHTS}", "pictures/0.png", "model.safetensors"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert is_model(path) == model


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    for ask in (lambda: open_weights(NAME), lambda: check_push(NAME)):
        with pytest.raises(UserError, match=r'without huggingface_hub: pip install "terdit-jax\[hub\]"'):
            ask()


def test_a_folder_is_pushed_whole(hub, tiny, tmp_path):
    check_push("me/mine")
    assert push(hub.folder / NAME, "me/mine") == "https://hub/me/mine"
    assert_same_leaves(open_weights("me/mine"), tiny)


def test_a_push_that_cannot_be_is_refused_before_and_told_of_after(hub, tmp_path):
    for name in ("", "mine", "me/mine@main", "me/a/b", "me/mi ne"):
        with pytest.raises(UserError, match="^--push_to=.*: must be ORGANISATION/NAME"):
            check_push(name)
    hub.fails = ConnectionError("refused")
    with pytest.raises(UserError, match="^here is written, but was not pushed to me/mine: .* hf upload me/mine here"):
        push(Path("here"), "me/mine")
    hub.token = None
    with pytest.raises(UserError, match="log in to the Hugging Face Hub first: hf auth login"):
        check_push("me/mine")
