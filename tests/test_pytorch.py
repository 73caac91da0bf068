"""The PyTorch module against the public code's recorded outputs, against our JAX model, and on files good and bad."""

import argparse
import ast
import dataclasses
import hashlib
import json
from pathlib import Path
import sys
import zlib

import pytest

torch = pytest.importorskip("torch")

from functools import partial  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from terdit_jax.interop import published, pytorch  # noqa: E402
from terdit_jax.interop.description import public_model_args  # noqa: E402
from terdit_jax.interop.exports import export  # noqa: E402
from terdit_jax.interop.pytorch import TerDiT, load, sample, to_images  # noqa: E402
from terdit_jax.interop.weights import consolidated_name, open_weights  # noqa: E402
from terdit_jax.model.transformer import forward, make_operands  # noqa: E402
from tests.deployed import VARIANTS, assert_same_leaves, random_weights, small_config  # noqa: E402
from tests.forged_containers import render, seal  # noqa: E402
from tests.golden_models import GOLDEN, assert_close, golden_arrays, random_params, tiny_config  # noqa: E402

WQ, NORM = "layers.1.attention.wq.weight", "layers.0.ffn_norm.weight"


def fields_of(config) -> dict:
    names = (*pytorch._INTEGERS, *pytorch._FLAGS, *pytorch._OF_TRAINING, "positions")
    return {name: getattr(config, name) for name in names}


def golden_fields(name) -> dict:
    meta = json.loads((GOLDEN / f"{name}.json").read_text())
    overrides = {"hidden_size": meta["dim"], "depth": meta["n_layers"], "num_heads": meta["n_heads"]}
    return fields_of(tiny_config(ternary=meta["kind"] == "terdit", qk_norm=meta["qk_norm"], **overrides))


def described(fields, **sample_settings) -> dict:
    return {"name": "tiny", "model": fields, "latent_scale": 0.5, "sample": sample_settings}


def as_tensors(arrays) -> dict:
    return {name: torch.tensor(array) for name, array in arrays.items()}


def build(fields, arrays, dtype=torch.float32, packed=True):
    model = TerDiT(fields, dtype=dtype, packed=packed)
    model.load_state_dict(as_tensors(arrays), strict=True)
    return model.requires_grad_(False).eval()


def published_arrays(config, params) -> dict:
    """Published names and arrays of our parameters, ternary weights in planes."""
    arrays = dict(published.published_tensors(config, published.params_leaves(params)))
    for name in [name.removesuffix("alphas") + "weight" for name in arrays if name.endswith(".alphas")]:
        arrays[name] = pytorch._ternary_planes(torch.tensor(arrays[name])).numpy()
    return arrays


def write_artifact(path, description, arrays, *, compressed=(), **changes):
    """An artifact as docs/format.md has it, written without our writer; `changes` replace metadata before the seal."""
    stored, entries, offset = {}, {}, 0
    for name in sorted(arrays, key=lambda name: arrays[name].dtype == np.uint8):
        stored[name] = zlib.compress(arrays[name].tobytes()) if name in compressed else arrays[name].tobytes()
        dtype = {"uint8": "U8", "float32": "F32"}[str(arrays[name].dtype)]
        shape = list(arrays[name].shape)
        if name in compressed:
            compressed[name], dtype, shape = [dtype, shape], "U8", [len(stored[name])]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(stored[name])]}
        offset += len(stored[name])
    metadata = {"format": "terdit_jax", "version": "1", "description": json.dumps(description)}
    metadata["sha256"] = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in stored.items()})
    metadata |= {"zlib": json.dumps(dict(compressed)), "header_sha256": "0" * 64} | changes
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    path.write_bytes(render(seal(header + b" " * (-len(header) % 8)), b"".join(stored.values())))
    return path


@pytest.fixture(scope="module")
def tiny():
    """(fields, arrays) of the packed reference model."""
    return golden_fields("terdit_tiny"), load_file(GOLDEN / "terdit_tiny.safetensors")


@pytest.fixture
def torch_export(tmp_path, tiny):
    fields, arrays = tiny
    torch.save(as_tensors(arrays), tmp_path / "consolidated_ema_ternary.00-of-01.pth")
    torch.save(argparse.Namespace(model="tiny", terdit_jax=described(fields)), tmp_path / "model_args.pth")
    return tmp_path


def test_the_file_stands_alone():
    imported = set()
    for node in ast.walk(ast.parse(Path(pytorch.__file__).read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            imported |= {name.split(".")[0] for name in names}
    assert "torch" in imported and imported <= sys.stdlib_module_names | {"torch"}


@pytest.mark.parametrize("name", ["terdit_tiny", "terdit_tiny_noqk", "largedit_tiny"])
def test_golden_forward_and_guidance(name):
    model = build(golden_fields(name), load_file(GOLDEN / f"{name}.safetensors"))
    io = as_tensors(golden_arrays(f"{name}_io"))
    out = model(io["x"], io["t"], io["y"])
    assert out.dtype == torch.float32
    assert_close(out, io["out"].numpy())
    denoise = pytorch._guided(model, io["cfg_y"][:2], 10, float(io["cfg_scale"]), 3)
    assert_close(denoise(io["cfg_x"], int(io["cfg_t"][0])), io["cfg_out"][:2].numpy())


def test_planes_unpack_to_codes_that_pack_again(tiny):
    planes = torch.from_numpy(tiny[1][WQ])
    codes = pytorch._unpacked(planes, torch.bfloat16)
    assert codes.shape == (64, 64) and set(codes.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(codes[16:32].float(), (planes >> 4 & 3).float() - 1)
    assert torch.equal(pytorch._ternary_planes(codes), planes)


@pytest.mark.parametrize("name", ["terdit_tiny", "terdit_tiny_noqk", "largedit_tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_unpacked_bit_for_bit(name, dtype):
    fields, arrays = golden_fields(name), load_file(GOLDEN / f"{name}.safetensors")
    io = as_tensors(golden_arrays(f"{name}_io"))
    packed, unpacked = (build(fields, arrays, dtype, packed)(io["x"], io["t"], io["y"]) for packed in (True, False))
    assert torch.equal(packed, unpacked)


def inputs(config):
    x = np.random.default_rng(3).standard_normal((3, *config.sample_shape), np.float32)
    return x, np.array([0, 417, 999]), np.array([0, 7, config.num_classes])


@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
def jax_output(config, params, x, t, y):
    return forward(config, make_operands(config, params), x, t, y)


def torch_output(config, params):
    """(B, H, W, 2C) in the configuration's dtype."""
    model = build(fields_of(config), published_arrays(config, params), getattr(torch, config.dtype))
    x, t, y = map(torch.from_numpy, inputs(config))
    return model(x.permute(0, 3, 1, 2), t, y).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "num_heads": 8,
            "num_kv_heads": 2,
            "positions": "rope_1d_sincos_2d",
            "in_channels": 1,
            "adaln_rms_norm": False,
        },
        {"ternary": False, "num_heads": 8, "num_kv_heads": 4, "positions": "rope_1d_sincos_2d"},
    ],
)
def test_agrees_with_jax(overrides):
    config = tiny_config(depth=2, **overrides)
    params = random_params(config)
    assert_close(torch_output(config, params), np.asarray(jax_output(config, params, *inputs(config))))


@pytest.mark.parametrize("ternary", [True, False])
def test_agrees_with_jax_in_bfloat16(ternary):
    """Neither is further from float32 than the other, and they are nearer to each other than to it: they round at the
    same places, but for the weights inside attention kernels and for last bits where sums run in another order."""
    config = tiny_config(depth=2, ternary=ternary)
    half, params = dataclasses.replace(config, dtype="bfloat16"), random_params(config)
    exact, ours = torch_output(config, params), torch_output(half, params)
    theirs = np.asarray(jax_output(half, params, *inputs(config)))
    error, their_error = np.linalg.norm(ours - exact), np.linalg.norm(theirs - exact)
    assert 1e-3 < error / np.linalg.norm(exact) < 2e-2
    assert 0.85 < error / their_error < 1.15
    assert np.linalg.norm(ours - theirs) < error


def test_compiles_without_graph_breaks():
    config = tiny_config(depth=1)
    model = build(fields_of(config), published_arrays(config, random_params(config)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    settings = {"num_steps": 2, "cfg_scale": 1.0}
    assert_close(sample(compiled, [1, 2, 3], **settings), sample(model, [1, 2, 3], **settings).numpy())


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
    arguments, _ = public_model_args(ours.description)
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


@pytest.mark.parametrize(("method", "timesteps"), [("ddpm", None), ("ddim", list(range(0, 1000, 100)))])
def test_loop_is_the_public_codes(method, timesteps):
    golden = as_tensors(golden_arrays(f"sample_{method}10"))

    def denoise(x, t):
        eps = torch.einsum("oc,bchw->bohw", golden["eps_matrix"], x)
        return torch.cat([eps, torch.tanh(torch.einsum("oc,bchw->bohw", golden["var_matrix"], x))], 1)

    draw = iter(golden["noise"]).__next__
    x_0 = pytorch._reverse(denoise, golden["x_T"], draw, timesteps or pytorch._spaced(10), method)
    np.testing.assert_allclose(x_0, golden["out"], rtol=0, atol=1e-4)


def test_timesteps_are_those_of_jax():
    from terdit_jax.diffusion.schedule import space_timesteps

    for count in (1, 2, 5, 50, 250, 999, 1000):
        assert tuple(pytorch._spaced(count)) == space_timesteps(1000, count)


def test_golden_guided_sampling_end_to_end():
    io = as_tensors(golden_arrays("e2e_io"))
    model = build(fields_of(tiny_config(depth=2)), load_file(GOLDEN / "e2e.safetensors"))
    denoise = pytorch._guided(model, io["y"][:2], 10, float(io["cfg_scale"]), 3)
    x_0 = pytorch._reverse(denoise, io["z"][:2], iter(io["noise"][:, :2]).__next__, pytorch._spaced(5), "ddpm")
    assert_close(x_0, io["out"][:2].numpy(), 1e-4)


def test_samples_depend_on_seed_and_number_alone(tiny):
    model = build(*tiny)
    settings = {"num_steps": 3, "cfg_scale": 2.0}
    images = sample(model, [3, 1, 4], **settings)
    assert images.shape == (3, 4, 8, 8) and images.dtype == torch.float32 and not images.requires_grad
    assert_close(sample(model, np.array([1, 4]), first=1, **settings), images[1:].numpy(), 1e-4)
    assert_close(sample(model, torch.tensor([3]), **settings), images[:1].numpy(), 1e-4)
    for other in ({"seed": 1}, {"first": 1}, {"cfg_channels": 0}, {"method": "ddim"}):
        assert not torch.allclose(sample(model, [3], **settings | other), images[:1], atol=1e-2)
    noise = {pytorch._seed(seed, i) for seed in range(4) for i in range(1000)}
    assert len(noise) == 4000 and max(noise) < 2**32


def test_a_flow_model_is_not_sampled_as_a_ddpm_model(tiny):
    """Its velocity would pass for noise; a description without an objective is of DDPM."""
    model = build(*tiny)
    model.description = described(tiny[0]) | {"diffusion": {"objective": "ddpm"}}
    expected = sample(model, [5], num_steps=2)
    del model.description["diffusion"]
    torch.testing.assert_close(sample(model, [5], num_steps=2), expected, rtol=0, atol=0)
    for method in (None, "ddim"):
        model.description["diffusion"] = {"objective": "flow"}
        with pytest.raises(ValueError, match="the model's objective is 'flow': only ddpm models are sampled here"):
            sample(model, [5], num_steps=2, method=method)


def test_settings_come_from_the_description(tiny):
    model, plain = build(*tiny), build(*tiny)
    model.description = described(tiny[0], method="ddim", num_steps=2, cfg_scale=1.0, num_images=16)
    expected = sample(plain, [5], method="ddim", num_steps=2, cfg_scale=1.0)
    assert torch.equal(sample(model, [5]), expected)
    assert not torch.equal(sample(model, [5], num_steps=3), expected)


def test_the_last_channels_keep_the_labels_own_noise(tiny):
    model, y = build(*tiny), torch.tensor([2])
    x = torch.from_numpy(golden_arrays("terdit_tiny_io")["x"][:1])
    plain, guided = pytorch._guided(model, y, 10, 1.0, 3)(x, 500), pytorch._guided(model, y, 10, 4.0, 3)(x, 500)
    assert_close(guided[:, 3:], plain[:, 3:].numpy())
    assert not torch.allclose(guided[:, :3], plain[:, :3], atol=1e-3)


def test_images_are_bytes_channels_last():
    x = torch.tensor([-3.0, -2.0, 0.0, 2.0]).reshape(1, 1, 2, 2)
    images = to_images(x, 2.0)
    assert images.dtype == torch.uint8 and images.tolist() == [[[[0], [0]], [[128], [255]]]]
    with pytest.raises(ValueError, match="decode latents"):
        to_images(torch.zeros(1, 4, 2, 2), 1.0)
    with pytest.raises(ValueError, match="1 of 2 images hold values that are not finite"):
        to_images(torch.stack([x[0], x[0] / 0]), 1.0)


def refused(path, match=None):
    with pytest.raises(ValueError, match=match) as caught:
        load(path)
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
    refused(GOLDEN / "e2e_io.npz", "model_args.pth")
    for content in (b"", b"{}", b"\x02" + b"\0" * 7 + b"{]", b"\x89PNG" + b"\0" * 99, b"\x02" + b"\0" * 7 + b"{}"):
        (tmp_path / "m").write_bytes(content)
        refused(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds none of consolidated_ema_ternary.00-of-01.pth, ")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent")


class Touch:
    """What a hostile pickle would do, were it run."""

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
    refused(torch_export, "no model_args.pth")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"labels": [10]}, r"classes in 0..9, got 10..10"),
        ({"labels": []}, "got none"),
        ({"labels": [1.5]}, "whole numbers, got 1.5"),
        ({"labels": [1, True]}, "whole numbers, got True"),
        ({"labels": torch.tensor([1.0])}, r"whole numbers, got tensor.1"),
        ({"labels": torch.tensor([True])}, r"whole numbers, got tensor.True"),
        ({"labels": ["1"]}, "whole numbers, got '1'"),
        ({"method": "euler"}, "'euler'"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
        ({"cfg_scale": 1e38}, "cfg_scale is 1e.38: give a number from 0 to 1000"),
        ({"cfg_scale": -3}, "cfg_scale is -3"),
        ({"cfg_channels": -1}, "cfg_channels is -1"),
    ],
)
def test_settings_that_cannot_be_are_named(tiny, settings, match):
    with pytest.raises(ValueError, match=match):
        sample(build(*tiny), **{"labels": [0]} | settings)


def test_only_two_dtypes(tiny):
    with pytest.raises(ValueError, match=r"torch\.float16"):
        TerDiT(tiny[0], dtype=torch.float16)
