"""The networks of the PyTorch module against the public code's recorded outputs and against our JAX models."""

import ast
import dataclasses
from functools import partial
from pathlib import Path
import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from terdit_jax.interop import pytorch  # noqa: E402
from terdit_jax.interop.pytorch import TerDiT, sample  # noqa: E402
from terdit_jax.model.transformer import forward, make_operands  # noqa: E402
from terdit_jax.ternary.quantize import Rounding, absmean_codes  # noqa: E402
from tests.golden_models import BY_CHANNEL, DIT, assert_close, golden_arrays, random_params, tiny_config  # noqa: E402
from tests.torch_models import as_tensors, build, fields_of, golden_model, published_arrays  # noqa: E402

MODELS = ("terdit_tiny", "terdit_tiny_noqk", "largedit_tiny", "dit_tiny", "sit_tiny")
WQ = "layers.1.attention.wq.weight"


@pytest.fixture(scope="module")
def tiny():
    return golden_model("terdit_tiny")


def imported(nodes):
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[0] for name in names}


def test_the_file_stands_alone():
    """But for a name on the Hub, which is fetched by what diffusers comes with."""
    tree = ast.parse(Path(pytorch.__file__).read_text())
    assert "torch" in imported(tree.body) and imported(tree.body) <= sys.stdlib_module_names | {"torch"}
    assert imported(ast.walk(tree)) - imported(tree.body) == {"huggingface_hub"}


@pytest.mark.parametrize("name", MODELS)
def test_golden_forward_and_guidance(name):
    model = build(*golden_model(name))
    io = as_tensors(golden_arrays(f"{name}_io"))
    channels = io["out"].shape[1]  # SiT returns the first half
    out = model(io["x"], io["t"], io["y"])
    assert out.dtype == torch.float32 and out.shape[1] == 8
    assert_close(out[:, :channels], io["out"].numpy())
    guided = []
    for i in range(2):
        denoise = pytorch._guided(model, io["cfg_y"][i : i + 1], 10, float(io["cfg_scale"]), 3)
        guided.append(denoise(io["cfg_x"][i : i + 1], io["cfg_t"][i].item())[:, :channels])
    assert_close(torch.cat(guided), io["cfg_out"][:2].numpy())


def test_planes_unpack_to_codes_that_pack_again(tiny):
    planes = torch.from_numpy(tiny[1][WQ])
    codes = pytorch._unpacked(planes, torch.bfloat16)
    assert codes.shape == (64, 64) and set(codes.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(codes[16:32].float(), (planes >> 4 & 3).float() - 1)
    assert torch.equal(pytorch._ternary_planes(codes), planes)


def test_q_k_and_v_of_dit_are_ternarised_each_by_its_own_mean():
    parts = [
        scale * torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i, scale in enumerate((1, 9, 81))
    ]
    codes = pytorch._unpacked(pytorch._ternary_planes(torch.cat(parts), 3), torch.float32)
    alone = [pytorch._unpacked(pytorch._ternary_planes(part), torch.float32) for part in parts]
    assert torch.equal(codes, torch.cat(alone))


@pytest.mark.parametrize("gamma_per", ["matrix", "channel"])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_master_weights_get_the_codes_that_jax_gives_them(gamma_per, threshold):
    weight = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32) * np.logspace(-2, 2, 24)[:, None]
    weight = weight.astype(np.float32)
    fields = {"gamma_per": gamma_per, "threshold": threshold}
    codes = pytorch._unpacked(pytorch._ternary_planes(torch.tensor(weight), 1, fields), torch.float32)
    np.testing.assert_array_equal(codes, absmean_codes(weight, Rounding(**fields)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha_per", "row"),
        ("gamma_per", None),
        ("threshold", 0),
        ("threshold", 1.0),
        ("threshold", float("nan")),
        ("threshold", "0.7"),
    ],
)
def test_a_quantiser_that_there_is_not_is_refused(tiny, field, value):
    with pytest.raises(ValueError, match=f"^the model's field {field}="):
        TerDiT({**tiny[0], field: value})


@pytest.mark.parametrize("fields", [{}, {"ternary": False}, DIT, {**DIT, "ternary": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_unpacked_bit_for_bit(fields, dtype):
    config = tiny_config(depth=2, **fields)
    arrays = published_arrays(config, random_params(config))
    x, t, y = map(torch.from_numpy, inputs(config))
    models = (build(fields_of(config), arrays, dtype, packed) for packed in (True, False))
    packed, unpacked = (model(x.permute(0, 3, 1, 2), t, y) for model in models)
    assert torch.equal(packed, unpacked)


def inputs(config):
    x = np.random.default_rng(3).standard_normal((3, *config.sample_shape), np.float32)
    return x, np.array([0, 417, 999]), np.array([0, 7, config.num_classes])


@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
def jax_output(config, params, x, t, y):
    return forward(config, make_operands(config, params), x, t, y)


def torch_output(config, params):
    """(B, H, W, C or 2C) in the configuration's dtype."""
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
        DIT,
        {**DIT, "adaln_rms_norm": False, "learn_sigma": False, "in_channels": 3},
        {**DIT, "ternary": False, "num_heads": 64},
        {"learn_sigma": False},
        {**BY_CHANNEL, "num_heads": 8, "num_kv_heads": 2},
        {**DIT, **BY_CHANNEL},
    ],
    ids=str,
)
def test_agrees_with_jax(overrides):
    config = tiny_config(depth=2, **overrides)
    params = random_params(config)
    assert_close(torch_output(config, params), np.asarray(jax_output(config, params, *inputs(config))))


@pytest.mark.parametrize("fields", [{}, {"ternary": False}, DIT, {**DIT, "ternary": False}], ids=str)
def test_agrees_with_jax_in_bfloat16(fields):
    """Neither is further from float32 than the other, and they are nearer to each other than to it: they round at the
    same places, but for the weights inside attention kernels and for last bits where sums run in another order."""
    config = tiny_config(depth=2, **fields)
    half, params = dataclasses.replace(config, dtype="bfloat16"), random_params(config)
    exact, ours = torch_output(config, params), torch_output(half, params)
    theirs = np.asarray(jax_output(half, params, *inputs(config)))
    error, their_error = np.linalg.norm(ours - exact), np.linalg.norm(theirs - exact)
    assert 1e-3 < error / np.linalg.norm(exact) < 2e-2
    assert 0.85 < error / their_error < 1.15
    assert np.linalg.norm(ours - theirs) < error


@pytest.mark.parametrize("fields", [{}, DIT], ids=["large_dit", "dit"])
def test_compiles_without_graph_breaks(fields):
    config = tiny_config(depth=1, **fields)
    model = build(fields_of(config), published_arrays(config, random_params(config)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    settings = {"num_steps": 2, "cfg_scale": 1.0}
    assert_close(sample(compiled, [1, 2, 3], **settings), sample(model, [1, 2, 3], **settings).numpy())


def test_only_two_dtypes(tiny):
    with pytest.raises(ValueError, match=r"torch\.float16"):
        TerDiT(tiny[0], dtype=torch.float16)
