"""Codes cut over `fsdp` that travel at 2 bits each; gathered, they equal those that `ternary.linear` multiplies by.

A layer's matmuls gather its packed codes and unpack them, the backward pass gathers them again, and its weight gradient
is reduced and scattered at once. The collectives are written out under `shard_map`: left to itself, XLA gathers int8 or
floats. They go through a torus ring by ring, each device's part one block of rows. Over several rings at once, or in
other shapes, the TPU compiler makes all-reduces of whole arrays of them: twice the bytes.

`parallel.sharding` says how arrays lie.
"""

from functools import partial
import math
from typing import NamedTuple

import jax
from jax import Array, lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.parallel.sharding import BATCH_AXES, partition_spec
from terdit_jax.ternary.linear import weight_gradient
from terdit_jax.ternary.packing import CODES_PER_BYTE, pack_quarters, unpack_quarters

GATHERS = ("codes", "bfloat16")  # values of config.mesh.gather: 2 bits a parameter travel, or 16 to compare with

_FSDP = "fsdp"  # the axis that weights are gathered over


class CodesCut(NamedTuple):
    """How one layer's codes are cut. spec: of (n, out, in) on the mesh. rings: sizes of the physical rings that `fsdp`
    is made of, the outermost first (`mesh.fsdp_rings`)."""

    spec: PartitionSpec
    rings: tuple[int, ...]


def cut_codes(name: str, codes: Array, gather: str, rings: tuple[int, ...]) -> tuple[Array, CodesCut | None]:
    """The codes of a map as they travel, and how they are cut; as they are and None where the mesh in context does not
    cut them over `fsdp`.

    Args:
      name: path of the map, by which `parallel.sharding` knows it.
      codes: (L, n, out, in) int8.
      gather: "codes" makes uint8 of them, a quarter of the side that `fsdp` does not cut (`pack_quarters` within each
        device's part); "bfloat16" uint16, the bits of bfloat16 codes. Integers take no gradient.
      rings: as of `CodesCut`; one ring if empty.

    Raises:
      UserError: a side too narrow to be packed in each device's part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[_FSDP] == 1:
        return codes, None
    spec = partition_spec(f"{name}/codes", codes.shape, mesh)
    cut = CodesCut(PartitionSpec(*spec[1:]), rings or (mesh.shape[_FSDP],))
    if gather == "bfloat16":
        return lax.bitcast_convert_type(codes.astype(jnp.bfloat16), jnp.uint16), cut
    # Packed along the axis that is not gathered: what is gathered then unpacks as a whole.
    axis = len(spec) - 2 if spec[-1] == _FSDP else len(spec) - 1
    parts = mesh.shape[spec[axis]] if spec[axis] else 1
    if codes.shape[axis] % (parts * CODES_PER_BYTE):
        raise UserError(
            f"{name} {codes.shape} has {codes.shape[axis]} rows or columns over {parts} devices, no multiple of "
            f"{CODES_PER_BYTE} each to be packed: set config.mesh.gather=bfloat16"
        )
    pack = partial(pack_quarters, axis=axis)
    return jax.shard_map(pack, in_specs=spec, out_specs=spec, check_vma=False)(codes), cut


def gather_codes(codes: Array, cut: CodesCut | None) -> Array:
    """One layer's codes (n, out, in), int8 or bfloat16, gathered over `fsdp` and still cut over `tensor`."""
    if cut is None:
        return codes
    spec, rings = cut
    axis = tuple(spec).index(_FSDP)

    def gather(part: Array) -> Array:
        part = jnp.moveaxis(part, axis, 0)
        blocks = part.reshape(1, -1, part.shape[-1])
        for groups in reversed(_ring_groups(rings)):
            blocks = lax.all_gather(blocks, _FSDP, axis=0, axis_index_groups=groups, tiled=True)
        gathered = blocks.reshape(-1, *part.shape[1:])
        if gathered.dtype == jnp.uint16:
            gathered = lax.bitcast_convert_type(gathered, jnp.bfloat16)
        else:
            gathered = unpack_quarters(gathered, axis=2)  # the axis that `cut_codes` packed
        return jnp.moveaxis(gathered, 0, axis)

    return jax.shard_map(gather, in_specs=spec, out_specs=_uncut(spec), check_vma=False)(codes)


def scattered_weight_gradient(x: Array, dy: Array, cut: CodesCut | None, dtype: DTypeLike) -> Array:
    """`ternary.linear.weight_gradient`, summed over the batch's devices and cut as the codes are: no device holds it
    whole."""
    if cut is None:
        return weight_gradient(x, dy, dtype)
    spec, rings = cut
    _, out_axis, in_axis = _uncut(spec)
    axis = tuple(spec).index(_FSDP)
    middle = (None,) * (x.ndim - 2)

    def form(x: Array, dy: Array) -> Array:
        dw = jnp.moveaxis(weight_gradient(x, dy, dtype), axis, 0)
        part = dw.reshape(math.prod(rings), -1, dw.shape[-1])
        for groups in _ring_groups(rings):
            part = lax.psum_scatter(part, _FSDP, scatter_dimension=0, axis_index_groups=groups, tiled=True)
        # Over fsdp first: what is then summed over data, which may lie across slices, is small.
        part = lax.psum(part, tuple(name for name in BATCH_AXES if name != _FSDP))
        return jnp.moveaxis(part.reshape(-1, *dw.shape[1:]), 0, axis)

    return jax.shard_map(
        form,
        in_specs=(PartitionSpec(BATCH_AXES, *middle, in_axis), PartitionSpec(BATCH_AXES, *middle, None, out_axis)),
        out_specs=spec,
        check_vma=False,
    )(x, dy)


def _uncut(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == _FSDP else axis for axis in spec))


def _ring_groups(rings: tuple[int, ...]) -> list[list[list[int]]]:
    """For every ring, the outermost first, the places on `fsdp` that form one."""
    places = np.arange(math.prod(rings)).reshape(rings)
    return [np.moveaxis(places, ring, -1).reshape(-1, size).tolist() for ring, size in enumerate(rings)]
