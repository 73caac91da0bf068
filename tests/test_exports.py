"""A loaded model is exported bit for bit in every format and comes back so; a failed export leaves nothing."""

import concurrent.futures
import dataclasses
import os
import sys

import pytest
from safetensors.numpy import load_file

from terdit_jax.choices import FORMATS
from terdit_jax.config_sections import DiffusionConfig
from terdit_jax.errors import UserError
from terdit_jax.interop.exports import export
from terdit_jax.interop.published import published_layout
from terdit_jax.interop.weights import HUB_WEIGHTS, Weights, consolidated_name, open_weights, packed_leaves
from tests.deployed import VARIANTS, assert_same_leaves, golden_weights, random_weights, small_config
from tests.golden_models import BY_CHANNEL, DIT, GOLDEN, tiny_config
from tests.torch_files import save_state_dict

GOLDEN_MODELS = ("terdit_tiny", "terdit_tiny_noqk", "largedit_tiny", "dit_tiny", "sit_tiny", "train_init")


def golden(name):
    return golden_weights(name, tiny_config(depth=2) if name == "train_init" else None)


@pytest.fixture(params=[kind for kind in FORMATS if kind != "hub"])
def kind(request):
    if request.param == "torch":
        pytest.importorskip("torch")
    return request.param


def written(path, kind, ternary=True):
    return path / consolidated_name(ema=True, ternary=ternary) if kind == "torch" else path


def assert_holds(path, kind, tensors):
    """The file holds these tensors bit for bit, read by the software that others read it with."""
    if kind == "torch":
        import torch

        found = {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}
    else:
        found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert found[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_a_golden_state_dict_is_exported_as_it_was_loaded(tmp_path, name, kind):
    masters = not name.startswith("terdit")
    if kind == "packed" and masters:
        pytest.skip("an artifact holds no master weights")
    weights = golden(name)
    output = tmp_path / "new" / "folder" / "out"
    export(weights, output, kind, masters=masters)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert_holds(written(output, kind, not masters), kind, load_file(GOLDEN / f"{name}.safetensors"))
    again = open_weights(output, masters=masters)
    assert again.description == weights.description and again.masters == masters
    assert_same_leaves(again, weights)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_model_goes_from_format_to_format(tmp_path, overrides, kind):
    """For example packed -> torch -> packed: the last equals the first, byte for byte."""
    weights = random_weights(small_config(**overrides), latent_scale=0.5, step=None)
    model = weights.model
    first = "packed" if model.ternary else "safetensors"
    if kind == "packed" and not model.ternary:
        pytest.skip("nothing to pack")
    if kind == "torch" and model.alpha_per != "matrix":
        pytest.skip("there is no such published layout")
    export(weights, tmp_path / "first", first)
    export(open_weights(tmp_path / "first"), tmp_path / "second", kind)
    export(open_weights(tmp_path / "second"), tmp_path / "third", first)
    assert (tmp_path / "third").read_bytes() == (tmp_path / "first").read_bytes()
    last = open_weights(tmp_path / "third")
    assert last.description == weights.description
    expected = Weights("memory", weights.description, lambda: packed_leaves(model, weights.leaves()), False)
    assert_same_leaves(last, expected)


@pytest.mark.parametrize(
    ("overrides", "masters", "as_kind"),
    [({}, False, "packed"), ({}, True, "safetensors"), ({**DIT, "ternary": False}, False, "safetensors")],
)
def test_a_folder_for_the_hub_holds_the_file_of_another_format(tmp_path, overrides, masters, as_kind):
    weights = random_weights(small_config(**overrides))
    export(weights, tmp_path / "hub", "hub", masters=masters)
    export(weights, tmp_path / "other", as_kind, masters=masters)
    assert (tmp_path / "hub" / HUB_WEIGHTS).read_bytes() == (tmp_path / "other").read_bytes()
    again = open_weights(tmp_path / "hub", masters=masters)
    assert again.description == weights.description
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        HUB_WEIGHTS,
        "README.md",
        "config.json",
        "terdit.py",
    }
    with pytest.raises(UserError, match="exists already"):
        export(weights, tmp_path / "hub", "hub")


def test_a_model_that_the_public_sampler_cannot_build_gets_a_remark(tmp_path):
    pytest.importorskip("torch")
    (remark,) = export(random_weights(small_config()), tmp_path / "out", "torch")
    assert remark.startswith("note: the public sampler knows three shapes only") and "\n" not in remark
    assert export(random_weights(small_config()), tmp_path / "other", "packed") == []
    with pytest.raises(UserError, match="--format=onnx: choose one of packed, torch, safetensors, hub"):
        export(random_weights(small_config()), tmp_path / "third", "onnx")


def test_what_the_public_code_would_take_for_another_model_is_not_written_for_it(tmp_path):
    with pytest.raises(UserError, match="^memory has alpha_per='channel', the published layout one scale a matrix: "):
        export(random_weights(small_config(alpha_per="channel")), tmp_path / "out", "torch")
    weights = random_weights(small_config(gamma_per="channel", threshold=0.7))
    with pytest.raises(
        UserError, match="^memory has gamma_per='channel' and threshold=0.7, .* other codes of its mast"
    ):
        export(weights, tmp_path / "out", "torch", masters=True)
    assert not any(tmp_path.iterdir())
    pytest.importorskip("torch")
    export(weights, tmp_path / "out", "torch")  # codes are codes
    assert open_weights(tmp_path / "out").model == weights.model


def test_master_weights_keep_how_they_are_quantised(tmp_path):
    weights = random_weights(small_config(**BY_CHANNEL))
    export(weights, tmp_path / "masters", "safetensors", masters=True)
    again = open_weights(tmp_path / "masters", masters=True)
    assert again.model == weights.model
    assert_same_leaves(again, weights)
    for name in ("masters", "memory"):
        source = again if name == "masters" else weights
        export(source, tmp_path / f"{name}.packed", "packed")
    assert (tmp_path / "masters.packed").read_bytes() == (tmp_path / "memory.packed").read_bytes()


@pytest.mark.parametrize(("project", "objective"), [("DiT", "ddpm"), ("SiT", "flow")])
def test_a_published_dit_or_sit_goes_out_as_it_came_and_keeps_what_shapes_do_not_tell(
    tmp_path, project, objective, kind
):
    if kind == "packed":
        pytest.skip("nothing to pack")
    tensors = load_file(GOLDEN / f"{project.lower()}_tiny.safetensors")
    save_state_dict(tensors, tmp_path / f"{project}-XL-2-256x256.pt")
    weights = open_weights(tmp_path / f"{project}-XL-2-256x256.pt", num_heads=4)
    output = tmp_path / "out"
    export(weights, output, kind)
    assert_holds(written(output, kind, ternary=False), kind, tensors)
    again = open_weights(output)
    assert again.description == weights.description
    assert (again.model.num_heads, again.description.diffusion.objective) == (4, objective)
    assert_same_leaves(again, weights)


def test_the_public_code_of_dit_takes_the_file_that_the_remark_names(tmp_path):
    torch = pytest.importorskip("torch")
    model = small_config(
        **DIT, ternary=False, hidden_size=384, depth=12, num_heads=6, input_size=32, patch_size=8, num_classes=1000
    )
    (remark,) = export(random_weights(model, diffusion=DiffusionConfig()), tmp_path / "out", "torch")
    command, _, file = remark.rpartition(" --ckpt=")
    assert command == "note: the public sampler of DiT takes it by --model=DiT-S/8 --image-size=256"
    assert torch.load(file, weights_only=True).keys() == published_layout(model, False).keys()


def test_the_public_code_reads_model_args(tmp_path):
    torch = pytest.importorskip("torch")
    import argparse

    export(random_weights(small_config(), codec="sd-vae-ft-mse"), tmp_path / "out", "torch")
    with torch.serialization.safe_globals([argparse.Namespace]):
        arguments = torch.load(tmp_path / "out" / "model_args.pth", weights_only=True)
    assert (arguments.image_size, arguments.num_classes, arguments.qk_norm, arguments.vae) == (64, 10, True, "mse")


@pytest.mark.parametrize("place", ["file", "folder", "dangling link"])
def test_nothing_is_overwritten(tmp_path, kind, place):
    output = tmp_path / "out"
    if place == "file":
        output.write_text("precious")
    elif place == "folder":
        output.mkdir()
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"--output={output}: exists already, name another place"):
        export(random_weights(small_config()), output, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert place != "file" or output.read_text() == "precious"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, kind):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="cannot write .*out: Not a directory"):
        export(random_weights(small_config()), tmp_path / "file" / "out", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "precious"


def test_a_source_that_turns_out_damaged_leaves_nothing(tmp_path, kind):
    weights = random_weights(small_config())

    def leaves():
        for i, leaf in enumerate(weights.leaves()):
            if i == 10:
                raise UserError("a tensor does not match its SHA-256")
            yield leaf

    with pytest.raises(UserError, match="does not match its SHA-256"):
        export(dataclasses.replace(weights, leaves=leaves), tmp_path / "out", kind)
    assert not list(tmp_path.iterdir())


def test_without_pytorch_only_pth_files_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    weights = random_weights(small_config())
    with pytest.raises(UserError, match="--format=torch needs PyTorch to write .pth files: pip install torch"):
        export(weights, tmp_path / "out", "torch")
    assert not list(tmp_path.iterdir())
    for kind in ("packed", "safetensors"):
        export(weights, tmp_path / kind, kind)


def test_of_many_exports_to_one_path_one_succeeds_and_the_others_are_refused(tmp_path, kind):
    """Whole, and of one model: no writer shares a temporary name with another."""
    models = [random_weights(small_config(depth=1 + i % 2), step=i) for i in range(8)]

    def write(weights):
        try:
            export(weights, tmp_path / "out", kind)
        except UserError as error:
            assert "exists already" in str(error)
            return None
        return weights

    with concurrent.futures.ThreadPoolExecutor(len(models)) as pool:
        (winner,) = [weights for weights in pool.map(write, models) if weights]
    assert os.listdir(tmp_path) == ["out"]
    assert open_weights(tmp_path / "out").description == winner.description
