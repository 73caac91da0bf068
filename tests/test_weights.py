"""Whatever a path holds is opened as what it is, the right file of several, and says in one line why it cannot be."""

import argparse

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from terdit_jax.errors import UserError
from terdit_jax.interop.exports import export
from terdit_jax.interop.published import model_leaves, params_leaves, params_tree, published_tensors
from terdit_jax.interop.weights import (
    MODEL_ARGS,
    consolidated_name,
    open_weights,
    packed_leaves,
)
from terdit_jax.ternary.packing import pack
from terdit_jax.ternary.quantize import absmean_codes
from tests.deployed import (
    assert_same_leaves,
    golden_weights,
    make_workdir,
    random_params,
    random_weights,
    small_config,
    weights_of,
)
from tests.golden_models import GOLDEN
from tests.torch_files import as_tensor, save_tensors

TOLD = {"num_heads": 4, "objective": "flow"}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """(path, step -> (raw, averaged) parameters)"""
    path = tmp_path_factory.mktemp("run")
    return path, make_workdir(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of all four consolidated files, with weights that tell which is which."""
    pytest.importorskip("torch")
    place = tmp_path_factory.mktemp("folder")
    for ema in (True, False):
        weights = weights_of(small_config(), random_params(small_config(), ema), ema=ema)
        for masters in (True, False):
            export(weights, place / "one", "torch", masters=masters)
            for file in (place / "one").iterdir():
                file.rename(place / file.name)
            (place / "one").rmdir()
    return place


def tree_of(weights):
    return params_tree(weights.leaves())


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize(("step", "found"), [(None, 2), (1, 1)])
def test_a_workdir_gives_its_raw_or_averaged_weights_of_a_step(workdir, ema, step, found):
    path, saved = workdir
    weights = open_weights(path, ema=ema, step=step)
    description = weights.description
    assert (description.name, description.step, description.ema, weights.masters) == ("tiny", found, ema, True)
    assert description.sample.num_steps == 5 and weights.model == description.model
    tree = tree_of(weights)
    jax.tree.map(np.testing.assert_array_equal, tree, saved[found][ema])
    assert [path for path, _ in weights.leaves()] == [leaf.path for leaf in model_leaves(weights.model)]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {"step": 3}, "step 3 was asked for, but .* is no workdir"),
        ([], {}, "neither a run's checkpoints/ nor consolidated_ema_ternary.* nor consolidated_ema.*is nothing"),
        (["b.txt", "a.txt"], {}, "nor consolidated_ema.00-of-01.pth: there is a.txt, b.txt"),
        (
            ["consolidated_ema_ternary.00-of-01.pth"], {"ema": False},
            "consolidated_ternary.00-of-01.pth nor consolidated.00-of-01.pth: there is consolidated_ema",
        ),
        (
            [f"consolidated_ema.{i:02}-of-02.pth" for i in range(2)], {},
            r"several parts \(consolidated_ema.01-of-02.pth\): only 00-of-01",
        ),
    ],
)  # fmt: skip
def test_a_folder_of_something_else_says_what_it_holds(tmp_path, names, options, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path, **options)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "DiT-XL-2-256x256.pt"])
def test_a_file_of_something_else_is_one_line(tmp_path, name):
    (tmp_path / name).write_text("not a model")
    with pytest.raises(UserError, match=name) as caught:
        open_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("masters", [True, False])
def test_a_folder_gives_the_file_asked_for(folder, ema, masters):
    weights = open_weights(folder, ema=ema, masters=masters)
    assert weights.source == str(folder / consolidated_name(ema, not masters))
    assert (weights.masters, weights.description.ema) == (masters, ema)
    assert_same_leaves(open_weights(weights.source), weights)
    params = random_params(small_config(), ema)
    expected = params_leaves(params) if masters else packed_leaves(small_config(), params_leaves(params))
    jax.tree.map(np.testing.assert_array_equal, tree_of(weights), params_tree(expected))


def test_a_folder_gives_what_it_has(folder, tmp_path):
    for masters in (True, False):
        place = tmp_path / str(masters)
        place.mkdir()
        for name in (consolidated_name(True, ternary=not masters), MODEL_ARGS):
            (place / name).write_bytes((folder / name).read_bytes())
        assert open_weights(place, masters=not masters).masters == masters


def test_a_file_without_model_args_must_have_a_published_shape(folder, tmp_path):
    name = consolidated_name(True, True)
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match=f"{name}: width 32 with 2 layers is none of the published models"):
        open_weights(tmp_path)


def test_model_args_of_another_model_are_refused(folder, tmp_path):
    export(random_weights(small_config(qk_norm=False)), tmp_path / "other", "torch")
    name = consolidated_name(True, True)
    (tmp_path / "other" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="describes a model with qk_norm=False, its tensors have True"):
        open_weights(tmp_path / "other")


def test_safetensors_of_other_software_are_taken_for_a_published_model(tmp_path):
    name = "model.safetensors"
    tensors = dict(published_tensors(small_config(), random_weights(small_config()).leaves()))
    save_file({key: np.array(tensor) for key, tensor in tensors.items()}, tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: width 32 with 2 layers is none of the published models"):
        open_weights(tmp_path / name)


def test_ternarising_is_the_quantisers_and_leaves_the_rest_alone():
    model = small_config(num_kv_heads=1)
    params = random_params(model)
    packed = dict(packed_leaves(model, params_leaves(params)))
    codes_of = jax.jit(lambda w: pack(absmean_codes(w)))
    for leaf in model_leaves(model):
        original = dict(params_leaves(params))[leaf.path]
        expected = codes_of(original) if leaf.ternary else original
        assert packed[leaf.path].dtype == expected.dtype
        np.testing.assert_array_equal(packed[leaf.path], expected, err_msg=leaf.path)
    again = dict(packed_leaves(model, packed.items()))
    assert all(again[path] is array for path, array in packed.items()), "what is packed already stays as it is"


@pytest.fixture
def dit():
    """The tensors of a DiT of no published size, with four heads."""
    return load_file(GOLDEN / "dit_tiny.safetensors")


@pytest.mark.parametrize(
    "name", ["SiT-XL-2-256.pt", "SiT-XL-2-256x256.pth", "SiT-XL-2-256x256.safetensors", "0400000.pt"]
)
def test_a_published_dit_or_sit_is_a_bare_state_dict(tmp_path, dit, name):
    path = save_tensors(dit, tmp_path / name)
    weights = open_weights(path, **(TOLD if name.startswith("0") else {"num_heads": 4}))
    description = weights.description
    assert (description.name, description.diffusion.objective) == (path.stem, "flow")
    assert (description.ema, description.model.num_heads, weights.masters) == (True, 4, True)
    assert_same_leaves(weights, golden_weights("dit_tiny"))
    with pytest.raises(UserError, match="holds averaged weights alone, but raw ones were asked for"):
        open_weights(path, ema=False, **TOLD)


def test_model_args_of_other_weights_do_not_speak_for_a_published_file(tmp_path, dit):
    pytest.importorskip("torch")
    export(random_weights(small_config()), tmp_path / "folder", "torch")
    description = open_weights(save_tensors(dit, tmp_path / "folder" / "DiT-S-2.pt"), num_heads=4).description
    assert (description.name, description.model.family) == ("DiT-S-2", "dit")


def test_a_training_checkpoint_gives_averaged_and_raw_weights(tmp_path, dit):
    torch = pytest.importorskip("torch")
    raw = {name: as_tensor(2 * array if "embedding" in name else array) for name, array in dit.items()}
    averaged = {name: as_tensor(array) for name, array in dit.items()}
    path, args = tmp_path / "0400000.pt", argparse.Namespace(model="DiT-XL/2", ckpt_every=50_000)
    torch.save({"model": raw, "ema": averaged, "opt": {"state": {}, "param_groups": []}, "args": args}, path)
    tables = []
    for ema in (True, False):
        weights = open_weights(path, ema=ema, **TOLD)
        assert weights.description.ema == ema
        tables.append(tree_of(weights)["y_embedder"]["embedding_table"])
    np.testing.assert_array_equal(tables[1], 2 * tables[0])


def test_what_is_given_must_not_contradict_the_file(tmp_path, workdir, dit):
    export(random_weights(small_config()), tmp_path / "model.safetensors", "packed")
    named = save_tensors(dit, tmp_path / "DiT-S-2-mine.safetensors")
    for path, given, message in (
        (tmp_path / "model.safetensors", {"num_heads": 4}, "has num_heads=2, but num_heads=4 was given: leave it out"),
        (tmp_path / "model.safetensors", {"objective": "flow"}, "has objective=ddpm, but objective=flow was given"),
        (workdir[0], {"num_heads": 4}, "has num_heads=2, but num_heads=4 was given"),
        (named, TOLD, "has objective=ddpm, but objective=flow was given"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_weights(path, **given)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    open_weights(tmp_path / "model.safetensors", num_heads=2, objective="ddpm")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.mlp.fc2.bias": None}, "checkpoint lacks tensor 'blocks.1.mlp.fc2.bias' that this model needs"),
        ({"projector.weight": (4, 4)}, "checkpoint tensor 'projector.weight' does not belong to this model"),
        (
            {"blocks.0.attn.proj.weight": (64, 32)},
            r"'blocks.0.attn.proj.weight' has shape \(64, 32\), this model needs",
        ),
        ({"x_embedder.proj.weight": None}, "not a DiT or SiT checkpoint, it lacks tensor 'x_embedder.proj.weight'"),
        ({"x_embedder.proj.weight": None, "pos_embed": None}, "not a checkpoint of TerDiT, Large-DiT, DiT or SiT"),
        ({"y_embedder.embedding_table.weight": (1, 64)}, "makes no model: model.num_classes=0"),
    ],
)
def test_tensors_that_make_no_dit_are_named_before_one_is_read(tmp_path, dit, name, change, message):
    tensors = dit | {key: np.zeros(shape or (), np.float32) for key, shape in change.items()}
    tensors = {key: array for key, array in tensors.items() if change.get(key, 0) is not None}
    path = save_tensors(tensors, tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        open_weights(path, **TOLD)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "message"), [("pos_embed", "is not the fixed table"), ("t_embedder.mlp.0.bias", "finite")]
)
def test_values_that_no_dit_has_are_named_with_their_file(tmp_path, dit, tensor, message):
    dit[tensor] = np.full_like(dit[tensor], np.inf if message == "finite" else 0)
    path = save_tensors(dit, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"a.safetensors: checkpoint tensor '{tensor}' .*{message}"):
        list(open_weights(path, **TOLD).leaves())


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_dit_that_is_cut_off_is_one_line(tmp_path, dit, share):
    path = save_tensors(dit, tmp_path / "DiT-S-2.pt")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="DiT-S-2.pt cannot be read as a file of torch.save") as caught:
        open_weights(path, **TOLD)
    assert "\n" not in str(caught.value)
