"""The loader of the PyTorch module on every kind of file, good and bad."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")

from terdit_jax.interop import pytorch  # noqa: E402
from terdit_jax.interop.exports import export  # noqa: E402
from terdit_jax.interop.known import public_model_args  # noqa: E402
from terdit_jax.interop.pytorch import TerDiT, load  # noqa: E402
from terdit_jax.interop.weights import consolidated_name, open_weights  # noqa: E402
from tests.deployed import VARIANTS, assert_same_leaves, random_weights, small_config  # noqa: E402
from tests.golden_models import BY_CHANNEL, GOLDEN, assert_close, golden_arrays  # noqa: E402
from tests.torch_models import as_tensors, described, golden_model, write_artifact  # noqa: E402

WQ, NORM = "layers.1.attention.wq.weight", "layers.0.ffn_norm.weight"


@pytest.fixture(scope="module")
def tiny():
    return golden_model("terdit_tiny")


@pytest.fixture
def torch_export(tmp_path, tiny):
    fields, arrays = tiny
    torch.save(as_tensors(arrays), tmp_path / "consolidated_ema_ternary.00-of-01.pth")
    torch.save(argparse.Namespace(model="tiny", terdit_jax=described(fields)), tmp_path / "model_args.pth")
    return tmp_path


@pytest.mark.parametrize("kind", ["artifact", "compressed", "safetensors", "directory", "pth"])
def test_loads_every_kind_of_file_and_gives_it_back_bit_for_bit(tmp_path, tiny, torch_export, kind):
    fields, arrays = tiny
    path = tmp_path / "model.safetensors"
    if kind == "artifact":
        write_artifact(path, described(fields), arrays)
    elif kind == "compressed":
        write_artifact(path, described(fields), arrays, compressed={WQ: None})
    elif kind == "safetensors":
        save_file(arrays, path, {"description": json.dumps(described(fields))})
    else:
        path = torch_export / ("" if kind == "directory" else "consolidated_ema_ternary.00-of-01.pth")
    model = load(path)
    assert model.description == described(fields) and not model.training
    state_dict = model.state_dict()
    assert state_dict.keys() == arrays.keys()
    for name, array in arrays.items():
        assert str(state_dict[name].dtype) == f"torch.{array.dtype}", name
        assert state_dict[name].numpy().tobytes() == array.tobytes(), name
    io = as_tensors(golden_arrays("terdit_tiny_io"))
    for packed in (True, False):
        out = load(path, dtype=torch.float32, packed=packed)(io["x"], io["t"], io["y"])
        assert not out.requires_grad
        assert_close(out, io["out"].numpy())


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_jax_to_pytorch_to_jax_is_the_same_bit_for_bit(tmp_path, variant):
    config = small_config(**VARIANTS[variant])
    export(random_weights(config), tmp_path / "ours.safetensors", "packed" if config.ternary else "safetensors")
    ours = open_weights(tmp_path / "ours.safetensors")
    model = load(tmp_path / "ours.safetensors")
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(model.state_dict(), folder / consolidated_name(ema=True, ternary=config.ternary))
    arguments = public_model_args(ours.description)
    torch.save(argparse.Namespace(**arguments, terdit_jax=model.description), folder / "model_args.pth")
    back = open_weights(folder)
    assert back.description == ours.description
    assert_same_leaves(back, ours)


def test_a_loaded_model_needs_its_file_no_longer(tiny, torch_export):
    model = load(torch_export)
    file = torch_export / "consolidated_ema_ternary.00-of-01.pth"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(model.state_dict()[WQ], torch.from_numpy(tiny[1][WQ]))


def test_every_tensor_goes_to_the_device(torch_export):
    model = load(torch_export, device="meta")
    with torch.device("meta"):
        out = model(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert {tensor.device.type for tensor in (out, *model.buffers(), *model.parameters())} == {"meta"}


def test_averaged_and_ternary_weights_come_first(tiny, torch_export):
    weights = as_tensors(tiny[1])
    (torch_export / "consolidated_ema_ternary.00-of-01.pth").unlink()
    for mark, stem in enumerate(reversed(pytorch._PREFERENCE)):
        torch.save(weights | {NORM: torch.full((64,), float(mark))}, torch_export / f"{stem}.00-of-01.pth")
        assert torch.all(load(torch_export).state_dict()[NORM] == mark)


def test_master_weights_are_ternarised(tmp_path, tiny):
    fields, arrays = tiny
    master = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    save_file(arrays | {WQ: master}, tmp_path / "m", {"description": json.dumps(described(fields))})
    codes = np.clip(np.round(master / (np.abs(master).mean() + 1e-6)), -1, 1)
    assert np.array_equal(pytorch._unpacked(load(tmp_path / "m").state_dict()[WQ], torch.float32).numpy(), codes)


@pytest.mark.parametrize(("name", "objective"), [("dit_tiny", "ddpm"), ("sit_tiny", "flow")])
@pytest.mark.parametrize("wrapping", ["bare", "training", "without averages"])
def test_published_dit_and_sit_are_known_by_their_shapes_and_names(tmp_path, name, objective, wrapping):
    fields, arrays = golden_model(name)
    contents = tensors = as_tensors(arrays)
    if wrapping == "training":
        other = {key: tensor + 1 for key, tensor in tensors.items()}
        contents = {"model": other, "ema": tensors, "opt": {"step": 3}, "args": argparse.Namespace(model="DiT-XL/2")}
    elif wrapping == "without averages":
        contents = {"model": tensors}
    path = tmp_path / f"{name[0].upper()}iT-XL-2-64x64.pt"
    torch.save(contents, path)
    model = load(path, num_heads=4, dtype=torch.float32)
    of_training = {"class_dropout_prob", "alpha_init", "adaln_rms_norm"}  # of which full precision has none
    assert {key: model.fields[key] for key in fields if key not in of_training} == {
        key: value for key, value in fields.items() if key not in of_training
    }
    latents = {"codec": "sd-vae-ft-ema", "latent_scale": 0.18215}
    fields = {key: value for key, value in model.fields.items() if key not in BY_CHANNEL}  # which it has as published
    about = {"name": path.stem, "model": fields, "diffusion": {"objective": objective}}
    assert model.description == about | latents
    io = as_tensors(golden_arrays(f"{name}_io"))
    assert_close(model(io["x"], io["t"], io["y"])[:, : io["out"].shape[1]], io["out"].numpy())
    state_dict = model.state_dict()
    assert state_dict.keys() == arrays.keys()
    for key, array in arrays.items():
        assert state_dict[key].numpy().tobytes() == array.tobytes(), key


def test_what_a_bare_file_does_not_say_must_be_given(tmp_path, tiny, torch_export):
    path = tmp_path / "bare" / "weights.pt"
    path.parent.mkdir()
    tensors = as_tensors(golden_model("sit_tiny")[1])
    torch.save(tensors, path)
    refused(path, "objective is None, and the name begins as neither DiT-XL-2 nor SiT-XL-2", num_heads=4)
    refused(path, "objective is 'edm'", num_heads=4, objective="edm")
    refused(path, "width 64 with 2 layers is no size of the published DiT and SiT: give num_heads", objective="flow")
    refused(path, "num_heads=5", num_heads=5, objective="flow")
    assert load(path, num_heads=4, objective="flow").description["diffusion"] == {"objective": "flow"}
    torch.save(tensors | {"pos_embed": tensors["pos_embed"] + 1e-3}, path)
    refused(path, "'pos_embed' is not the fixed table of 2-D positions", num_heads=4, objective="flow")
    torch.save(tensors | {"pos_embed": tensors["pos_embed"][0, 0]}, path)
    refused(path, "it has no tensor 'pos_embed' of 3 axes", num_heads=4, objective="flow")
    head = {name: tensors[name][:16].clone() for name in ("final_layer.linear.weight", "final_layer.linear.bias")}
    torch.save(tensors | head, path)
    refused(path, "has output channels for the variance, and this has none", num_heads=4, objective="ddpm")
    assert load(path, num_heads=4, objective="flow").fields["learn_sigma"] is False
    torch.save(tensors, path.with_name("SiT-S-2.pt"), _use_new_zipfile_serialization=False)
    assert load(path.with_name("SiT-S-2.pt"), num_heads=4, objective="flow").fields["num_heads"] == 4
    refused(
        path.with_name("SiT-S-2.pt"), "has objective=flow, but objective=ddpm was given", num_heads=4, objective="ddpm"
    )
    artifact = write_artifact(tmp_path / "m", described(tiny[0]), tiny[1])
    for file in (torch_export, artifact):
        load(file, num_heads=4, objective="ddpm")
        refused(file, "has num_heads=4, but num_heads=8 was given: leave it out", num_heads=8)
        refused(file, "has objective=ddpm, but objective=flow was given: leave it out", objective="flow")


def test_tensors_that_share_their_numbers_take_no_memory(torch_export):
    file = torch_export / "consolidated_ema_ternary.00-of-01.pth"
    torch.save({NORM: torch.ones(1).expand(1 << 40)}, file)
    refused(torch_export, "together are larger than the file")


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "size", "objective"),
    [
        ("DiT-XL-2-256x256.pt", 1152, 28, 16, 32, "ddpm"),
        ("DiT-XL-2-512x512.pt", 1152, 28, 16, 64, "ddpm"),
        ("SiT-XL-2-256.pt", 1152, 28, 16, 32, "flow"),
        ("SiT-B-2.pt", 768, 12, 12, 32, "flow"),
    ],
)
def test_sizes_of_published_dit_and_sit(name, width, depth, heads, size, objective):
    """By shapes alone: the files are of gigabytes."""
    fields, _ = golden_model("dit_tiny")
    large = {"hidden_size": width, "depth": depth, "num_heads": heads, "num_kv_heads": heads, "input_size": size}
    with torch.device("meta"):
        state_dict = TerDiT(fields | large | {"num_classes": 1000}).state_dict()
    _, found, description = pytorch._describe_dit(Path(name), state_dict, None, None)
    assert fields | large | {"num_classes": 1000, "adaln_rms_norm": False} == fields | found
    assert description["diffusion"] == {"objective": objective}
    if size == 32 and width == 1152:
        assert sum(tensor.numel() for tensor in state_dict.values()) == 675_129_632


def test_published_checkpoints_are_known_by_their_model_args(tmp_path):
    width, depth, heads = pytorch._PUBLISHED["DiT_Llama_600M_patch2"]
    torch.save({"y_embedder.embedding_table.weight": torch.zeros(1001, 1), "a.alphas": torch.ones(1)}, tmp_path / "w")
    args = argparse.Namespace(model="DiT_Llama_600M_patch2", image_size=512, vae="ema")
    torch.save(args, tmp_path / "model_args.pth")
    _, fields, description = pytorch._read(tmp_path / "w")
    assert description is None
    expected = dict(input_size=64, hidden_size=width, depth=depth, num_heads=heads, num_classes=1000, qk_norm=False)
    assert fields | expected | {"ternary": True, "adaln_rms_norm": True} == fields
    with torch.device("meta"):
        state_dict = TerDiT(fields | {"qk_norm": True}).state_dict()
    ternary = sum(4 * tensor.numel() for tensor in state_dict.values() if tensor.dtype == torch.uint8)
    assert ternary == 603_979_776
    rest = sum(tensor.numel() for tensor in state_dict.values() if tensor.dtype != torch.uint8)
    assert ternary + rest == 609_984_160


def refused(path, match=None, **settings):
    with pytest.raises(ValueError, match=match) as caught:
        load(path, **settings)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 500


def test_any_flipped_bit_of_an_artifact_is_refused(tmp_path, tiny):
    path = write_artifact(tmp_path / "m", described(tiny[0]), tiny[1], compressed={WQ: None})
    good = path.read_bytes()
    load(path)
    for position in [*range(0, 1000, 97), *range(1000, len(good), len(good) // 25), len(good) - 1]:
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        refused(path)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 16]))
    refused(path, "fails its SHA-256")
    at = good.index(b"tiny")
    path.write_bytes(good[:at] + b"tine" + good[at + 4 :])
    refused(path, "SHA-256 of its header")
    for damaged in (good[:-1], good + b"\0", good[:100], good[:7]):
        path.write_bytes(damaged)
        refused(path)


def test_streams_that_expand_too_far_or_not_as_described_are_refused(tmp_path, tiny):
    fields, arrays = tiny
    bomb = {WQ: np.zeros_like(arrays[WQ])}
    refused(write_artifact(tmp_path / "a", described(fields), arrays | bomb, compressed={WQ: None}), "twofold")
    for shape, match in (([8, 64], "one whole zlib stream"), ([17, 64], "has 1024 bytes"), ([1 << 40, 64], "twofold")):
        zlib_entry = json.dumps({WQ: ["U8", shape]})
        refused(
            write_artifact(tmp_path / "b", described(fields), arrays, compressed={WQ: None}, zlib=zlib_entry), match
        )
    refused(write_artifact(tmp_path / "c", described(fields), arrays, zlib=json.dumps({WQ: ["U8", [16, 64]]})), "zlib")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({WQ: None}, f"lacks tensor '{WQ}'"),
        ({"rope.freqs": np.ones(2, np.float32)}, "has tensor 'rope.freqs' that does not belong"),
        ({NORM: np.ones(63, np.float32)}, rf"'{NORM}' has shape \(63,\), this model needs \(64,\)"),
        ({WQ: np.ones((64, 16), np.uint8)}, rf"'{WQ}' has shape \(64, 16\), this model needs \(16, 64\)"),
        ({WQ: np.ones((16, 64), np.float32)}, rf"'{WQ}' has shape \(16, 64\), this model needs \(64, 64\)"),
        ({NORM: np.ones(64, np.uint8)}, f"'{NORM}' has dtype torch.uint8, this model needs torch.float32"),
        ({WQ: np.full((16, 64), 0b00110000, np.uint8)}, f"'{WQ}' holds the 2-bit code 11"),
        ({NORM: np.full(64, np.nan, np.float32)}, f"'{NORM}' holds values that are not finite"),
        ({NORM: np.full(64, 1e30, np.float32)}, f"'{NORM}' holds values that are not finite, or beyond 2"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, tiny, changed, match):
    fields, arrays = tiny
    arrays = {name: array for name, array in (arrays | changed).items() if array is not None}
    save_file(arrays, tmp_path / "m", {"description": json.dumps(described(fields))})
    refused(tmp_path / "m", match)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"depth": 10**9}, "has 3 layers, its description says 1000000000"),
        ({"input_size": 2**20}, "tokens"),
        ({"hidden_size": 2**20, "num_heads": 1, "num_kv_heads": 1}, "has shape"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"qk_norm": 1}, "qk_norm=1"),
        ({"positions": "learned"}, "positions='learned'"),
        ({"window": 3}, "'window' is unknown"),
        ({"num_classes": None}, "num_classes=None"),
        ({"family": "unet"}, "family='unet': choose one of large_dit, dit"),
        ({"family": "dit"}, "positions='rope_1d': choose one of sincos_2d"),
        ({"family": "dit", "positions": "sincos_2d"}, "no qk_norm"),
        ({"family": "dit", "positions": "sincos_2d", "qk_norm": False}, "lacks tensor 'blocks."),
        ({"learn_sigma": False}, "'final_layer.linear.*has shape"),
        ({"learn_sigma": 1}, "learn_sigma=1"),
    ],
)
def test_descriptions_that_make_no_model_are_named(tmp_path, tiny, changed, match):
    fields, arrays = tiny
    refused(write_artifact(tmp_path / "m", described(fields | changed), arrays), match)


def test_other_kinds_of_file_are_refused(tmp_path, tiny, torch_export):
    fields, arrays = tiny
    refused(write_artifact(tmp_path / "m", described(fields), arrays, version="2"), "version '2'")
    refused(write_artifact(tmp_path / "m", described(fields), arrays, format="other"), "format 'other'")
    refused(GOLDEN / "terdit_tiny.safetensors", "has no description")
    refused(GOLDEN / "e2e_io.npz", "e2e_io.npz cannot be read as plain tensors")
    for content in (b"", b"{}", b"\x02" + b"\0" * 7 + b"{]", b"\x89PNG" + b"\0" * 99, b"\x02" + b"\0" * 7 + b"{}"):
        (tmp_path / "m").write_bytes(content)
        refused(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds none of consolidated_ema_ternary.00-of-01.pth, ")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent")


class Touch:
    """An object of a hostile pickle, which touches a file if it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_run(torch_export):
    weights, args = torch_export / "consolidated_ema_ternary.00-of-01.pth", torch_export / "model_args.pth"
    ours = args.read_bytes()
    torch.save(Touch(torch_export / "touched"), args)
    refused(torch_export, "model_args.pth cannot be read as plain tensors")
    assert not (torch_export / "touched").exists()
    torch.save({"model": "tiny"}, args)
    refused(torch_export, "model_args.pth holds a dict")
    torch.save(argparse.Namespace(model="DiT_B"), args)
    refused(torch_export, "names model 'DiT_B'")
    torch.save(argparse.Namespace(), args)
    refused(torch_export, "malformed")
    args.write_bytes(ours)
    torch.save({"step": 3}, weights)
    refused(torch_export, "is no state dict")
    weights.write_bytes(b"PK\x03\x04 cut short")
    refused(weights, "cannot be read")
    args.unlink()
    torch.save({NORM: torch.ones(64)}, weights)
    refused(torch_export, "no model_args.pth")
