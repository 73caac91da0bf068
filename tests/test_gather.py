"""Maps cut over fsdp give the same numbers as whole ones, and a compiled step gathers 2 bits a ternary parameter."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from terdit_jax.aot.collectives import mesh_axes, read_collectives, sent_bytes
from terdit_jax.aot.program import activation_bytes
from terdit_jax.config_sections import MeshConfig
from terdit_jax.diffusion.objective import Ddpm
from terdit_jax.errors import UserError
from terdit_jax.fast.eight_bit import SAME
from terdit_jax.fast.linear import FastLinear, make_fast
from terdit_jax.fast.plan import FastPlan
from terdit_jax.model.transformer import abstract_params, count_params
from terdit_jax.parallel.mesh import make_mesh
from terdit_jax.parallel.sharding import abstract_sharded, batch_sharding
from terdit_jax.ternary.linear import TernaryLinear
from terdit_jax.training.step import loss_and_grads
from tests.golden_models import assert_close, random_params, tiny_config

# Two maps of each layer in the model: cut along their input (fsdp) and heads (tensor), and the other way round.
PATHS = {("attention", "qkv"): (2, 3, 16, 32), ("attention", "out"): (2, 1, 32, 16)}


def mesh_of(data, fsdp, tensor):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def operands_of(codes, alphas, sinks):
    """Operands as the model nests them: {"blocks": {"attention": {"qkv": ..., "out": ...}}}."""
    maps = {name: TernaryLinear(codes[name], alphas[name], sinks[name]) for _, name in PATHS}
    return {"blocks": {"attention": maps}}


def two_maps(kind, rings, codes, alphas, sinks, x):
    """Both maps of two layers, one after the other; kind None leaves the operands as they are."""
    operands = operands_of(codes, alphas, sinks)
    if kind:
        operands = make_fast(operands, SAME, kind, rings)
        assert all(isinstance(leaf, FastLinear) for leaf in operands["blocks"]["attention"].values())

    def layer(x, maps):
        hidden = jnp.sin(maps["qkv"](x)).sum(-2)  # (B, T, 16)
        return x + jnp.cos(maps["out"](hidden)[..., 0, :]), None

    x, _ = jax.lax.scan(layer, x, operands["blocks"]["attention"])
    return x


@pytest.fixture(scope="module")
def case():
    random = np.random.default_rng(0)
    codes = {name: random.integers(-1, 2, shape).astype(np.int8) for (_, name), shape in PATHS.items()}
    alphas = {name: (0.1 * random.standard_normal(shape[:2])).astype(np.float32) for (_, name), shape in PATHS.items()}
    x, dy = random.standard_normal((2, 8, 5, 32)).astype(np.float32)
    return codes, alphas, x, dy


def gradients(case, kind, rings=(), grad_dtype=jnp.float32):
    """The result and the gradients with respect to sinks and input."""
    codes, alphas, x, dy = case

    @jax.jit
    def run(x, dy):
        sinks = {name: jnp.zeros(value.shape, grad_dtype) for name, value in codes.items()}
        y, pullback = jax.vjp(lambda sinks, x: two_maps(kind, rings, codes, alphas, sinks, x), sinks, x)
        return y, *pullback(dy)

    return jax.tree.map(np.asarray, run(x, dy))


@pytest.mark.parametrize(
    ("shape", "kind", "rings"),
    [((2, 2, 2), "codes", ()), ((1, 8, 1), "codes", (2, 4)), ((1, 4, 2), "bfloat16", (2, 2))],
)
def test_a_cut_map_and_its_gradients_equal_the_whole_ones(case, shape, kind, rings):
    expected = gradients(case, None)
    with jax.set_mesh(mesh_of(*shape)):
        actual = gradients(case, kind, rings)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(assert_close, actual, expected)


def test_the_weight_gradient_is_reduced_in_the_sinks_dtype(case):
    with jax.set_mesh(mesh_of(1, 8, 1)):
        _, sinks, _ = gradients(case, "codes", grad_dtype=jnp.bfloat16)
    exact = gradients(case, None)[1]
    for name, sink in sinks.items():
        assert sink.dtype == jnp.bfloat16
        error = np.abs(sink.astype(np.float32) - exact[name]).max() / np.abs(exact[name]).max()
        assert 1e-5 < error < 0.03, name


def test_a_cut_map_multiplies_in_8_bits_as_the_whole_one_does(case):
    codes, alphas, x, dy = case
    with jax.set_mesh(mesh_of(2, 2, 2)):
        operands = make_fast(operands_of(codes, alphas, codes), "int8", "codes", ())
        assert all(leaf.matmul_dtype == "int8" for leaf in operands["blocks"]["attention"].values())
        first = jax.tree.map(lambda leaf: leaf[0], operands["blocks"]["attention"]["qkv"])
        actual = jax.jit(lambda x: first(x))(x)
    whole = FastLinear(codes["qkv"][0], alphas["qkv"][0], codes["qkv"][0], None, "int8")(jnp.asarray(x))
    assert_close(actual, whole)
    exact = TernaryLinear(codes["qkv"][0], alphas["qkv"][0], codes["qkv"][0])(jnp.asarray(x))
    assert np.abs(whole - exact).max() > 1e-4


def test_without_fsdp_nothing_is_packed(case):
    codes, alphas, *_ = case
    operands = operands_of(codes, alphas, codes)
    assert make_fast(operands, SAME, "codes", ()) == operands
    with jax.set_mesh(mesh_of(4, 1, 2)):
        assert make_fast(operands, SAME, "codes", ()) == operands


def test_a_side_too_narrow_to_pack_is_refused():
    narrow = TernaryLinear(*(jnp.zeros(shape, jnp.int8) for shape in ((1, 1, 8, 4), (1, 1), (1, 1, 8, 4))))
    with jax.set_mesh(mesh_of(1, 4, 2)), pytest.raises(UserError, match="4 rows or columns over 2 devices.*bfloat16"):
        make_fast({"blocks": {"attention": {"out": narrow}}}, SAME, "codes", ())


MODEL = dataclasses.replace(
    tiny_config(hidden_size=32, num_heads=4, depth=3, ffn_multiple_of=32), dtype="bfloat16", grad_dtype="bfloat16"
)


@pytest.fixture(scope="module")
def compiled_step():
    return compile_step(MODEL)


def compile_step(model, layers="scanned"):
    """Loss and gradients of the model on eight devices of fsdp, and its collectives."""
    mesh = mesh_of(1, 8, 1)
    params = abstract_sharded(abstract_params(model), mesh)
    picture = jax.ShapeDtypeStruct((16, *model.sample_shape), jnp.float32, sharding=batch_sharding(mesh))
    number = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=batch_sharding(mesh))
    examples = {"x_0": picture, "x_t": picture, "noise": picture, "t": number, "y": number}
    with jax.set_mesh(mesh):
        plan = FastPlan(layers=layers, gather="codes", rings=(8,))
        step = partial(loss_and_grads, model, Ddpm(), plan=plan)
        lowered = jax.jit(step).lower(params, examples)
    return lowered.as_text(), read_collectives(lowered.compile().as_text())


def test_a_compiled_step_gathers_two_bits_a_ternary_parameter(compiled_step):
    _, collectives = compiled_step
    weights = [c for c in collectives if c.kind == "all-gather" and c.dtype == "u8"]
    assert {c.trips for c in weights} == {MODEL.depth}
    bits = 8 * sum(c.bytes * c.trips for c in weights) / count_params(MODEL)["ternary"]
    assert bits == 2 * 2.0  # gathered forward and again backward
    # Nothing else is gathered in the layers, nor anything as large as a matrix of theirs outside.
    others = [c for c in collectives if c.kind == "all-gather" and c not in weights]
    assert all(c.trips == 1 for c in others)
    # The whole step's traffic against the same with codes in 16 bits. Reductions count as they were traced, in
    # bfloat16: the CPU backend makes float32 of them.
    scattered = [c for c in collectives if c.kind == "reduce-scatter" and c.trips == MODEL.depth]
    total = sent_bytes(weights) + sent_bytes(scattered) / 2
    assert (total + 7 * sent_bytes(weights)) / total >= 2.2


def test_unrolled_layers_gather_no_map_twice_that_both_passes_can_share():
    """On CPUs that is all; on GPUs adaLN, gathered for all layers at once though differentiated one by one."""
    _, collectives = compile_step(MODEL, "unrolled")
    gathered = 4 * sum(c.bytes * c.trips for c in collectives if c.kind == "all-gather" and c.dtype == "u8")
    assert gathered == count_params(MODEL)["ternary"]


def test_a_compiled_step_scatters_every_weight_gradient_once(compiled_step):
    traced, collectives = compiled_step
    scattered = [c for c in collectives if c.kind == "reduce-scatter" and c.trips == MODEL.depth]
    assert sum(np.prod(c.shape) * c.trips for c in scattered) == count_params(MODEL)["ternary"]
    assert {mesh_axes(c, {"data": 1, "fsdp": 8, "tensor": 1}) for c in scattered} == {("fsdp",)}
    # They cross the mesh in compute.grad_dtype.
    signatures = [line for line in traced.split("stablehlo.reduce_scatter")[1:]]
    assert len(signatures) == len(scattered)
    assert all("xbf16>) -> tensor<" in text.partition("}) :")[2][:120] for text in signatures)


def test_operands_are_cut_as_their_weights():
    with jax.set_mesh(mesh_of(2, 2, 2)):
        operands = jax.jit(partial(FastPlan(gather="codes").make_operands, MODEL))(random_params(MODEL))
    out = operands["blocks"]["attention"]["out"]
    assert isinstance(out, FastLinear)
    assert out.codes.dtype == jnp.uint8 and out.codes.shape == (3, 1, 32, 8)
    expected = NamedSharding(mesh_of(2, 2, 2), PartitionSpec(None, None, "fsdp", "tensor"))
    assert out.codes.sharding.is_equivalent_to(expected, 4) and out.sink.sharding.is_equivalent_to(expected, 4)


@pytest.mark.parametrize("kind", ["codes", "bfloat16"])
def test_policies_of_rematerialisation_see_gathered_matmuls(kind):
    """Every policy keeps the same number of bytes an image with a mesh as without."""
    for remat in ("none", "dots", "block"):
        model, plan = tiny_config(remat=remat), FastPlan(gather=kind)
        assert activation_bytes(model, mesh_of(4, 2, 1), plan) == activation_bytes(model)
