"""Ternary linear maps whose weights are cut over `fsdp`: what travels is 2-bit codes, gathered where they are used.

A layer's matmuls gather its packed codes and unpack them, the backward pass gathers them again, and its weight gradient
is reduced and scattered at once. The collectives are written out under `shard_map`: left to itself, XLA gathers int8 or
floats. They go through a torus ring by ring, each device's part one block of rows: over several rings at once, or in
other shapes, the TPU compiler makes all-reduces of whole arrays of them, twice the bytes.

How arrays lie is `sharding`'s, the arithmetic is `ternary.linear`'s.
"""

from functools import partial
import math

from flax import struct
import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import jax.tree_util as jtu
import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.parallel.sharding import LOGICAL_TO_MESH, partition_spec, path_name
from terdit_jax.ternary.activations import Rows
from terdit_jax.ternary.linear import (
    SAME,
    TernaryLinear,
    code_product,
    input_gradient,
    scale_product,
    weight_gradient,
)
from terdit_jax.ternary.packing import CODES_PER_BYTE, pack_quarters, unpack_quarters

GATHERS = ("codes", "bfloat16")  # values of config.mesh.gather

_CUT = "fsdp"  # the axis that weights are gathered over
_BATCH = LOGICAL_TO_MESH["batch"]


@struct.dataclass
class GatheredLinear:
    """y = alpha x T^T under training, each device holding a part of T. Equals `TernaryLinear` on whole codes.

    codes: (n, out, in), cut as the weight is: uint8 with a quarter of the side that `fsdp` does not cut
      (`pack_quarters` within each device's part), or uint16, the bits of bfloat16 codes. Integers take no gradient.
    alpha: (n,) float32.
    sink: (n, out, in) zeros, cut as the weight, through which the gradient of W leaves.
    spec: how (n, out, in) lie on the mesh.
    rings: sizes of the physical rings that `fsdp` is made of, the outermost first (`mesh.fsdp_rings`).
    operand: dtype in which the matmuls with T are done.
    """

    codes: Array
    alpha: Array
    sink: Array
    spec: PartitionSpec = struct.field(pytree_node=False)
    rings: tuple[int, ...] = struct.field(pytree_node=False)
    operand: str = struct.field(pytree_node=False, default=SAME)

    def __call__(self, x: Array) -> Array:
        """(B, ..., in) -> (B, ..., n, out) in x's dtype; B is cut over data and fsdp."""
        return scale_product(*self.product(Rows(x)))

    def product(self, x: Rows) -> tuple[Rows, Array]:
        """As `TernaryLinear.product`."""
        y = gathered_matmul(self.spec, self.rings, self.operand, x, self.codes, self.sink)
        return y, lax.stop_gradient(self.alpha)


def gather_operands(operands: dict, kind: str, rings: tuple[int, ...] = ()) -> dict:
    """The operands with every ternary map that the mesh in context cuts over `fsdp` made a `GatheredLinear`.

    Args:
      operands: a tree with `TernaryLinear`s, layers stacked in front.
      kind: "codes" (2 bits a parameter travel) or "bfloat16" (16 bits: what it saves is measured against this).
      rings: of `mesh.fsdp_rings`; one ring if left out.

    Raises:
      UserError: a side too narrow to be packed in each device's part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[_CUT] == 1:
        return operands

    def gathered(path: tuple, leaf: Array | TernaryLinear) -> Array | TernaryLinear | GatheredLinear:
        if not isinstance(leaf, TernaryLinear):
            return leaf
        name = path_name(path)
        spec = partition_spec(f"{name}/codes", leaf.codes.shape, mesh)
        if kind == "bfloat16":
            codes = lax.bitcast_convert_type(leaf.codes.astype(jnp.bfloat16), jnp.uint16)
        else:
            axis = _packed_axis(spec)
            parts = mesh.shape[spec[axis]] if spec[axis] else 1
            if leaf.codes.shape[axis] % (parts * CODES_PER_BYTE):
                raise UserError(
                    f"{name} {leaf.codes.shape} has {leaf.codes.shape[axis]} rows or columns over {parts} devices, no "
                    f"multiple of {CODES_PER_BYTE} each to be packed: set config.mesh.gather=bfloat16"
                )
            pack = partial(pack_quarters, axis=axis)
            codes = jax.shard_map(pack, in_specs=spec, out_specs=spec, check_vma=False)(leaf.codes)
        behind_layers = PartitionSpec(*spec[1:])
        return GatheredLinear(codes, leaf.alpha, leaf.sink, behind_layers, rings or (mesh.shape[_CUT],), leaf.operand)

    return jtu.tree_map_with_path(gathered, operands, is_leaf=lambda leaf: isinstance(leaf, TernaryLinear))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def gathered_matmul(
    spec: PartitionSpec, rings: tuple[int, ...], operand: str, x: Rows, codes: Array, sink: Array
) -> Rows:
    """As `ternary.linear.ternary_matmul`, with codes and sink as `GatheredLinear` has them."""
    return code_product(x, _whole(spec, rings, codes), operand)


def _gathered_matmul_fwd(
    spec: PartitionSpec, rings: tuple[int, ...], operand: str, x: Rows, codes: Array, sink: Array
) -> tuple[Rows, tuple]:
    # Kept for the backward pass is the part, not what was gathered. The matmul stands here itself: inside a call of
    # `gathered_matmul`, policies of rematerialisation would not see it.
    y = code_product(x, _whole(spec, rings, codes), operand)
    return y, (x.kept(), codes, jnp.zeros((0,), sink.dtype))


def _gathered_matmul_bwd(
    spec: PartitionSpec, rings: tuple[int, ...], operand: str, residuals: tuple, dy: Rows
) -> tuple[Rows, np.ndarray, Array]:
    x, codes, sink = residuals
    dx = input_gradient(x, dy, _whole(spec, rings, codes), operand)
    dw = _scattered_weight_gradient(spec, rings, x.values, dy.values, sink.dtype)
    return dx, np.zeros(codes.shape, jax.dtypes.float0), dw


gathered_matmul.defvjp(_gathered_matmul_fwd, _gathered_matmul_bwd)


def _packed_axis(spec: PartitionSpec) -> int:
    """Which of the last two axes is packed: the one that is not gathered, so that unpacking knows no parts."""
    return len(spec) - 2 if spec[-1] == _CUT else len(spec) - 1


def _uncut(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == _CUT else axis for axis in spec))


def _whole(spec: PartitionSpec, rings: tuple[int, ...], codes: Array) -> Array:
    """Codes (n, out, in), int8 or bfloat16, gathered over `fsdp` and still cut over `tensor`."""
    cut = tuple(spec).index(_CUT)

    def gather(part: Array) -> Array:
        part = jnp.moveaxis(part, cut, 0)
        blocks = part.reshape(1, -1, part.shape[-1])
        for groups in reversed(_ring_groups(rings)):
            blocks = lax.all_gather(blocks, _CUT, axis=0, axis_index_groups=groups, tiled=True)
        gathered = blocks.reshape(-1, *part.shape[1:])
        if gathered.dtype == jnp.uint16:
            gathered = lax.bitcast_convert_type(gathered, jnp.bfloat16)
        else:
            gathered = unpack_quarters(gathered, axis=2)  # of the two that remain, the one that is not the group
        return jnp.moveaxis(gathered, 0, cut)

    return jax.shard_map(gather, in_specs=spec, out_specs=_uncut(spec), check_vma=False)(codes)


def _scattered_weight_gradient(
    spec: PartitionSpec, rings: tuple[int, ...], x: Array, dy: Array, dtype: jnp.dtype
) -> Array:
    """(n, out, in) in `dtype`, summed over the batch's devices and cut as `spec` says: no device holds it whole."""
    _, out_axis, in_axis = _uncut(spec)
    cut = tuple(spec).index(_CUT)
    middle = (None,) * (x.ndim - 2)

    def form(x: Array, dy: Array) -> Array:
        dw = jnp.moveaxis(weight_gradient(x, dy, dtype), cut, 0)
        part = dw.reshape(math.prod(rings), -1, dw.shape[-1])
        for groups in _ring_groups(rings):
            part = lax.psum_scatter(part, _CUT, scatter_dimension=0, axis_index_groups=groups, tiled=True)
        # Over fsdp first: what is then summed over data, which may lie across slices, is small.
        part = lax.psum(part, tuple(axis for axis in _BATCH if axis != _CUT))
        return jnp.moveaxis(part.reshape(-1, *dw.shape[1:]), 0, cut)

    return jax.shard_map(
        form,
        in_specs=(PartitionSpec(_BATCH, *middle, in_axis), PartitionSpec(_BATCH, *middle, None, out_axis)),
        out_specs=spec,
        check_vma=False,
    )(x, dy)


def _ring_groups(rings: tuple[int, ...]) -> list[list[list[int]]]:
    """For every ring, the outermost first, the places on `fsdp` that form one."""
    places = np.arange(math.prod(rings)).reshape(rings)
    return [np.moveaxis(places, ring, -1).reshape(-1, size).tolist() for ring, size in enumerate(rings)]
