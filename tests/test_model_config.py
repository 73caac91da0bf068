"""Values derived from a model's fields, which fields make no model, and the work of one forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from terdit_jax.config import FIELDS, RunConfig
from terdit_jax.errors import UserError
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.traits import FAMILIES
from terdit_jax.model.transformer import abstract_params, count_params, forward, make_operands
from tests.golden_models import BY_CHANNEL, DIT, tiny_config
from tests.traced import products

SIZES = {  # name: (hidden_size, depth, num_heads) of the published models
    "600M": (1536, 16, 32),
    "4.2B": (3072, 32, 32),
    "7B": (4096, 32, 32),
}


def from_fields(**fields):
    config = RunConfig()
    for section in ("model", "compute", "mesh"):
        known = vars(getattr(config, section))
        given = {name: fields.pop(name) for name in known if name in fields}
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **given)})
    assert not fields
    return DiTConfig.from_config(config)


def published(name):
    hidden_size, depth, num_heads = SIZES[name]
    return from_fields(hidden_size=hidden_size, depth=depth, num_heads=num_heads)


@pytest.mark.parametrize(
    ("name", "head_dim", "mlp_width", "condition_width"),
    [("600M", 48, 4096, 1024), ("4.2B", 96, 8192, 1024), ("7B", 128, 11008, 1024)],
)
def test_published_widths(name, head_dim, mlp_width, condition_width):
    model = published(name)
    assert (model.head_dim, model.mlp_width, model.condition_width) == (head_dim, mlp_width, condition_width)
    assert (model.grid_size, model.num_tokens, model.sample_shape) == (16, 256, (32, 32, 4))


def test_widths_of_a_small_model():
    model = from_fields(hidden_size=96, num_heads=6, num_kv_heads=2, input_size=8, patch_size=4, ffn_multiple_of=32)
    assert (model.head_dim, model.kv_width, model.mlp_width, model.condition_width) == (16, 32, 256, 96)
    assert (model.grid_size, model.num_tokens) == (2, 4)


def test_no_kv_heads_means_as_many_as_heads():
    assert from_fields(num_kv_heads=0).num_kv_heads == 32
    assert from_fields(num_kv_heads=8).num_kv_heads == 8


def test_every_field_arrives_from_the_configuration():
    fields = dict(
        family="large_dit", learn_sigma=False,
        ternary=False, input_size=16, in_channels=3, patch_size=4, hidden_size=64, depth=2, num_heads=4,
        num_kv_heads=2, ffn_multiple_of=64, num_classes=7, class_dropout_prob=0.2, qk_norm=False,
        positions="rope_1d_sincos_2d", adaln_rms_norm=False, alpha_init="least_squares",
        alpha_per="matrix", gamma_per="matrix", threshold=0.5, dtype="float32",
        grad_dtype="float32", matmul_dtype="same", remat="dots", attention="xla", passes="xla", layers="unrolled",
        gather="bfloat16", plan="plain",
    )  # fmt: skip
    assert dataclasses.asdict(from_fields(**fields)) == fields
    assert from_fields(matmul_dtype="int8").matmul_dtype == "int8"
    assert BY_CHANNEL.items() <= vars(from_fields(**BY_CHANNEL)).items()


def test_a_model_is_one_hashable_value():
    assert hash(published("600M")) == hash(published("600M")) and published("600M") == published("600M")
    assert published("600M") != published("4.2B")
    with pytest.raises(dataclasses.FrozenInstanceError):
        published("600M").depth = 1


POSITIVE = (
    "input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads", "ffn_multiple_of", "num_classes",
)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({name: 0}, f"model.{name}=0: {FIELDS[f'model.{name}'].rule.words}") for name in POSITIVE),
        *(({name: -1}, f"model.{name}=-1: {FIELDS[f'model.{name}'].rule.words}") for name in POSITIVE),
        ({"num_kv_heads": -1}, "model.num_kv_heads=-1: must lie in [0, 4096]"),
        ({"patch_size": 3}, "model.input_size=32 is not divisible by model.patch_size=3"),
        ({"num_heads": 7}, "model.hidden_size=1536 is not divisible by model.num_heads=7"),
        ({"hidden_size": 96}, "model.hidden_size / model.num_heads = 3: RoPE needs an even width"),
        ({"num_kv_heads": 5}, "model.num_heads=32 is not divisible by model.num_kv_heads=5"),
        ({"num_kv_heads": 64}, "model.num_heads=32 is not divisible by model.num_kv_heads=64"),
        ({"hidden_size": 6, "num_heads": 3}, "model.hidden_size=6: must be a multiple of 4 to be packed"),
        ({"class_dropout_prob": 1.0}, "model.class_dropout_prob=1.0: must be in [0, 1), in float32 too"),
        ({"class_dropout_prob": -0.1}, "model.class_dropout_prob=-0.1: must be in [0, 1), in float32 too"),
        ({"positions": "rope"}, "model.positions='rope': choose one of rope_1d, rope_1d_sincos_2d, sincos_2d"),
        ({"family": "unet"}, "model.family='unet': choose one of large_dit, dit"),
        ({**DIT, "positions": "rope_1d"}, "model.positions='rope_1d': model.family='dit' takes 'sincos_2d'"),
        ({**DIT, "qk_norm": True}, "model.qk_norm=True: model.family='dit' takes False"),
        ({**DIT, "num_kv_heads": 8}, "model.num_kv_heads=8: model.family='dit' takes 0"),
        (
            {"positions": "sincos_2d"},
            "model.positions='sincos_2d': model.family='large_dit' takes 'rope_1d' or 'rope_1d_sincos_2d'",
        ),
        ({"alpha_init": "one"}, "model.alpha_init='one': choose one of normal, least_squares"),
        ({"dtype": "float16"}, "compute.dtype='float16': choose one of float32, bfloat16"),
        ({"grad_dtype": "int8"}, "compute.grad_dtype='int8': choose one of float32, bfloat16"),
        ({"matmul_dtype": "fp8"}, "compute.matmul_dtype='fp8': choose one of same, float8_e4m3fn, int8"),
        (
            {"ternary": False, "matmul_dtype": "int8"},
            "compute.matmul_dtype='int8': is of ternary models, not of full precision; give 'same'",
        ),
        ({"alpha_per": "row"}, "model.alpha_per='row': choose one of matrix, channel"),
        ({"gamma_per": ""}, "model.gamma_per='': choose one of matrix, channel"),
        (
            {"threshold": 1.0},
            "model.threshold=1.0: must lie in [0.001, 1): from 1 on, weights of one size are all 0",
        ),
        (
            {**DIT, "ternary": False, "alpha_per": "channel"},
            "model.alpha_per='channel': is of ternary models, not of full precision; give 'matrix'",
        ),
        (
            {"ternary": False, "threshold": 0.7},
            "model.threshold=0.7: is of ternary models, not of full precision; give 0.5",
        ),
        ({"remat": "all"}, "compute.remat='all': choose one of none, block, dots"),
        ({"attention": "flash"}, "compute.attention='flash': choose one of auto, xla, cudnn"),
        (
            {"hidden_size": 2**17, "depth": 1024, "num_heads": 2**10},
            "model.hidden_size=131072, model.depth=1024 and the others make 212,002,279,115,808 parameters, "
            "848,009,116,463,232 bytes: give a smaller model",
        ),
        ({"gather": "weights"}, "mesh.gather='weights': choose one of codes, bfloat16"),
    ],
)
def test_what_makes_no_model_is_refused(fields, message):
    with pytest.raises(UserError) as caught:
        from_fields(**fields)
    assert str(caught.value) == message


def test_every_family_of_the_configuration_has_its_traits():
    assert FIELDS["model.family"].rule.words == f"choose one of {', '.join(FAMILIES)}"


def test_a_feed_forward_that_cannot_be_packed_is_refused():
    with pytest.raises(UserError, match="ffn_multiple_of=6"):
        from_fields(hidden_size=64, num_heads=4, ffn_multiple_of=6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ternary": False},
        {"qk_norm": False, "adaln_rms_norm": False},
        {"hidden_size": 2048, "num_heads": 16, "num_kv_heads": 4, "depth": 3},
        {"in_channels": 1, "patch_size": 4, "num_classes": 10, "hidden_size": 32, "num_heads": 4, "learn_sigma": False},
        DIT,
        {**DIT, "ternary": False, "hidden_size": 1152, "num_heads": 16},
        {"hidden_size": 256, "num_heads": 16, "num_kv_heads": 4, **BY_CHANNEL},
        {**DIT, **BY_CHANNEL, "depth": 2},
    ],
)
def test_parameters_are_counted_without_shapes(fields):
    model = from_fields(**fields)
    assert model.num_params == count_params(model)["total"]


@pytest.mark.parametrize(("name", "teraflops"), [("600M", 0.238), ("4.2B", 1.88)])
def test_work_of_the_published_models(name, teraflops):
    assert published(name).flops_per_image() == pytest.approx(teraflops * 1e12, rel=0.02)


def test_work_of_600m_by_hand():
    layer = [
        4 * (256 * 1536 * 1536),  # q, k, v and out: tokens x in x out
        3 * (256 * 1536 * 4096),  # w1, w3, w2
        2 * (32 * 256 * 256 * 48),  # scores and their sum over values: heads x queries x keys x head_dim
        1024 * (6 * 1536),  # adaLN, once a picture
    ]
    ends = [
        256 * 16 * 1536,  # patch embedder: 2 x 2 pixels of 4 channels
        256 * 1024 + 1024 * 1024,  # timestep MLP
        1024 * (2 * 1536),  # final adaLN
        256 * 1536 * 32,  # final linear: 2 x 2 pixels of 8 channels
    ]
    assert published("600M").flops_per_image() == 2 * (16 * sum(layer) + sum(ends))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ternary": False, "qk_norm": False},
        {"num_heads": 8, "num_kv_heads": 2, "in_channels": 3, "patch_size": 4, "num_classes": 1000},
        {"hidden_size": 1536, "depth": 1, "layers": "unrolled"},  # wider than the condition
        {**DIT, "hidden_size": 1152, "num_heads": 16, "depth": 2, "learn_sigma": False},
    ],
)
def test_work_is_that_of_the_matmuls_in_the_traced_model(fields):
    model = tiny_config(**fields)
    shapes = [((1, *model.sample_shape), jnp.float32), ((1,), jnp.int32), ((1,), jnp.int32)]
    traced = jax.make_jaxpr(lambda params, *inputs: forward(model, make_operands(model, params), *inputs))(
        abstract_params(model), *(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    )
    assert model.flops_per_image() == matmul_flops(traced.jaxpr)


def matmul_flops(jaxpr):
    """Two for each multiplication of every dot_general."""
    total = 0
    for product, repeats in products(jaxpr):
        (contracted, _), _ = product.params["dimension_numbers"]
        terms = 1
        for axis in contracted:
            terms *= product.invars[0].aval.shape[axis]
        total += repeats * 2 * product.outvars[0].aval.size * terms
    return total
