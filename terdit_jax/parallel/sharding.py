"""The one table from an array's path to its place on the mesh, for parameters and everything that follows them.

Moments, EMA, ternary codes and packed codes carry their parameter's path, so one rule serves them all; a leaf that
matches no rule, or two, is an error. Activations are constrained by logical axis where they are made.
"""

import math
import re
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
import jax.tree_util as jtu
import numpy as np

from terdit_jax.errors import UserError

AnyMesh = Mesh | AbstractMesh
# Logical axis -> mesh axis. A matrix is cut along its input or output by `fsdp` and along heads or mlp by `tensor`.
BATCH_AXES = ("data", "fsdp")
HEADS_AXIS = "tensor"
LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "tokens": None,
    "layers": None,
    "group": None,
    "features": None,
    "rows": "fsdp",
    "embed": "fsdp",
    "heads": HEADS_AXIS,
    "mlp": "tensor",
}

_MATRIX = r"(weight|codes|sink|packed)"

# (pattern of the whole path, logical axes). Fused groups (qkv, w13) have a group axis after the layers.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"x_embedder/weight", ("rows", "features")),
    (r"x_embedder/bias", ("features",)),
    (r"t_embedder/mlp_(in|out)/weight", ("features", "embed")),
    (r"t_embedder/mlp_(in|out)/bias", ("features",)),
    (r"y_embedder/embedding_table", ("features", "embed")),
    (r"blocks/(attention_norm|ffn_norm)/scale", ("layers", "features")),
    (r"blocks/attention/(q|k)_norm/(scale|bias)", ("layers", "features")),
    (r"blocks/attention/w[qkv]/" + _MATRIX, ("layers", "heads", "embed")),
    (r"blocks/attention/wo/weight", ("layers", "embed", "heads")),
    (r"blocks/attention/qkv/" + _MATRIX, ("layers", "group", "heads", "embed")),
    (r"blocks/attention/out/" + _MATRIX, ("layers", "group", "embed", "heads")),
    (r"blocks/attention/w[qkv]/bias", ("layers", "heads")),
    (r"blocks/attention/qkv_bias", ("layers", "group", "heads")),
    (r"blocks/feed_forward/(w1|w3|fc1)/" + _MATRIX, ("layers", "mlp", "embed")),
    (r"blocks/feed_forward/(w2|fc2)/weight", ("layers", "embed", "mlp")),
    (r"blocks/feed_forward/(w13|up)/" + _MATRIX, ("layers", "group", "mlp", "embed")),
    (r"blocks/feed_forward/fc1/bias", ("layers", "mlp")),
    (r"blocks/feed_forward/up_bias", ("layers", "group", "mlp")),
    (r"blocks/(attention/wo|feed_forward/fc2)/bias", ("layers", "features")),
    (r"blocks/(attention/out|feed_forward/down)_bias", ("layers", "group", "features")),
    (r"blocks/feed_forward/down/" + _MATRIX, ("layers", "group", "embed", "mlp")),
    (r"blocks/adaLN_modulation/weight", ("layers", "rows", "features")),
    (r"blocks/adaLN_modulation/linear/" + _MATRIX, ("layers", "group", "rows", "features")),
    (r"blocks/adaLN_modulation/(bias|norm/scale)", ("layers", "features")),
    # The last axis of an alpha is there only where each output has its own (`logical_axes`). It is cut as the matrix's
    # rows are; where it is used, like a bias, not over fsdp.
    (r"blocks/attention/w[qkv]/alpha", ("layers", "heads")),
    (r"blocks/(attention/wo|feed_forward/(w2|fc2))/alpha", ("layers", "embed")),
    (r"blocks/feed_forward/(w1|w3|fc1)/alpha", ("layers", "mlp")),
    (r"blocks/adaLN_modulation/alpha", ("layers", "rows")),
    (r"blocks/attention/qkv/alpha", ("layers", "group", "heads")),
    (r"blocks/feed_forward/(w13|up)/alpha", ("layers", "group", "mlp")),
    (r"blocks/(attention/out|feed_forward/down|adaLN_modulation/linear)/alpha", ("layers", "group", "features")),
    (r"final_layer/(adaLN_modulation|linear)/weight", ("features", "embed")),
    (r"final_layer/(adaLN_modulation|linear)/bias", ("features",)),
    (r"window/sums/quartile_(loss|count)", ("features",)),
)


def path_name(path: tuple) -> str:
    """A tree path as `a/b/c`, whatever kinds of containers it crosses."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def logical_axes(path: str, ndim: int) -> tuple[str, ...]:
    """The logical axes of the leaf at a path, which has `ndim`: an alpha of whole matrices has no last one.

    Leading parts that are not the model's (`params`, `opt_state/0/mu`) are ignored: the rule must match the path's
    end, from a slash or its start.

    Raises:
      ValueError: if no rule or more than one rule matches.
    """
    found = [axes for pattern, axes in RULES if re.search(rf"(^|/){pattern}$", path)]
    if len(found) != 1:
        raise ValueError(f"{path} matches {len(found)} sharding rules; every leaf must match exactly one")
    return found[0][:ndim] if path.endswith("/alpha") else found[0]


def partition_spec(path: str, shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """Where the leaf at `path` lies. Scalars (step, counters, sums) are replicated and need no rule.

    Raises:
      UserError: if a dimension is not divisible by the mesh axis that cuts it.
    """
    if not shape:
        return PartitionSpec()
    axes = logical_axes(path, len(shape))
    if len(axes) != len(shape):
        raise ValueError(f"{path} has shape {shape}, its sharding rule names {len(axes)} axes")
    spec = tuple(LOGICAL_TO_MESH[axis] for axis in axes)
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(f"mesh axis {axis}={mesh.shape[axis]} does not divide dimension {size} of {path} {shape}")
    return PartitionSpec(*spec)


def tree_shardings(tree, mesh: AnyMesh):
    """A NamedSharding for every leaf of a tree of arrays or ShapeDtypeStructs. Raises as `partition_spec` does."""
    return jtu.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh)), tree
    )


def abstract_sharded(shapes, mesh: AnyMesh):
    """The shapes with their shardings: what restoring and compiling want in place of arrays. Nothing is allocated."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )


def place(array: np.ndarray | Array, sharding: NamedSharding) -> Array:
    """A host array, whole in every process, cut over the mesh."""
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def constrain_tree(tree):
    """Constrains every leaf to its rule on the mesh in context; the identity where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jtu.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, partition_spec(path_name(path), leaf.shape, mesh)),
        tree,
    )


def constrain(x: Array, *axes: str | None) -> Array:
    """Constrains an activation by logical axis (None: not cut) on the mesh in context; the identity without one.

    Every block constrains its residual stream: without it, slicing a projection that is cut over `tensor` returned
    wrong numbers on a (2, 2, 2) mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axis and LOGICAL_TO_MESH[axis] for axis in axes)))


def chip_bytes(tree: Any) -> int:
    """Bytes that one chip holds of a tree of shapes with shardings."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples on the leading axis, spread over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"]))


def batch_shards(mesh: AnyMesh) -> int:
    """Into how many parts the batch axis is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_heads(num_kv_heads: int, mesh: AnyMesh) -> None:
    """Raises UserError if the axis that attention is cut over would cut a head."""
    tensor = mesh.shape[HEADS_AXIS]
    if num_kv_heads % tensor:
        raise UserError(f"mesh axis {HEADS_AXIS}={tensor} does not divide the {num_kv_heads} kv heads")


def local_block(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which contiguous block of a global batch this process's devices hold: (its number, how many blocks there are).

    Meshes follow the network's topology, so the block need not be the process's own number, and processes that
    `tensor` joins share one.

    Raises:
      UserError: if the rows of this process are not one such block.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({(cut.start or 0, cut.stop or batch_size) for place in places if place for cut in place[:1]})
    first, last = rows[0][0], rows[-1][1]
    size = last - first
    if sum(stop - start for start, stop in rows) != size or first % size or batch_size % size:
        raise UserError(f"mesh {dict(mesh.shape)} gives process {jax.process_index()} scattered rows {rows} of a batch")
    return first // size, batch_size // size
