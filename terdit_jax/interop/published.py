"""The names and layouts of published state dicts (TerDiT, Large-DiT, DiT, SiT), to and from our parameters' leaves.

Both directions go leaf by leaf, so that a model passes through in the memory of its largest leaf; files are left to
the modules beside this one. PyTorch is not needed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
from functools import lru_cache
import re
from typing import Any

from flax.traverse_util import unflatten_dict
import jax
import ml_dtypes
import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.embedders import sincos_2d_table
from terdit_jax.model.transformer import abstract_params
from terdit_jax.parallel.sharding import path_name
from terdit_jax.ternary.packing import CODES_PER_BYTE, holds_unused_code, packed_to_planes, planes_to_packed
from terdit_jax.ternary.quantize import LARGEST

Leaves = Iterable[tuple[str, np.ndarray]]  # (path, whole leaf) of a parameter tree; ternary weights may be packed
Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # published name -> (dtype, shape)

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float64))

# Our path -> the published name; `{}` takes the layer's number, which we keep on axis 0.
_ENDS: tuple[tuple[str, str], ...] = (
    (r"t_embedder/mlp_in/(weight|bias)", r"t_embedder.mlp.0.\1"),
    (r"t_embedder/mlp_out/(weight|bias)", r"t_embedder.mlp.2.\1"),
    (r"y_embedder/embedding_table", r"y_embedder.embedding_table.weight"),
    (r"final_layer/adaLN_modulation/(weight|bias)", r"final_layer.adaLN_modulation.1.\1"),
    (r"final_layer/linear/(weight|bias)", r"final_layer.linear.\1"),
)
_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "large_dit": (
        *_ENDS,
        (r"x_embedder/(weight|bias)", r"x_embedder.\1"),
        (r"blocks/(attention_norm|ffn_norm)/scale", r"layers.{}.\1.weight"),
        (r"blocks/(attention|feed_forward)/(w[qkvo123])/weight", r"layers.{}.\1.\2.weight"),
        (r"blocks/(attention|feed_forward)/(w[qkvo123])/alpha", r"layers.{}.\1.\2.alphas"),
        (r"blocks/attention/(q|k)_norm/scale", r"layers.{}.attention.\1_norm.weight"),
        (r"blocks/attention/(q|k)_norm/bias", r"layers.{}.attention.\1_norm.bias"),
        (r"blocks/adaLN_modulation/(weight|bias)", r"layers.{}.adaLN_modulation.1.\1"),
        (r"blocks/adaLN_modulation/alpha", r"layers.{}.adaLN_modulation.1.alphas"),
        (r"blocks/adaLN_modulation/norm/scale", r"layers.{}.adaLN_modulation.2.weight"),
    ),
    "dit": (
        *_ENDS,
        (r"x_embedder/(weight|bias)", r"x_embedder.proj.\1"),
        (r"blocks/attention/w[qkv]/(weight|bias)", r"blocks.{}.attn.qkv.\1"),
        (r"blocks/attention/w[qkv]/alpha", r"blocks.{}.attn.qkv.alphas"),
        (r"blocks/attention/wo/(weight|bias)", r"blocks.{}.attn.proj.\1"),
        (r"blocks/attention/wo/alpha", r"blocks.{}.attn.proj.alphas"),
        (r"blocks/feed_forward/(fc[12])/(weight|bias)", r"blocks.{}.mlp.\1.\2"),
        (r"blocks/feed_forward/(fc[12])/alpha", r"blocks.{}.mlp.\1.alphas"),
        (r"blocks/adaLN_modulation/(weight|bias)", r"blocks.{}.adaLN_modulation.1.\1"),
        (r"blocks/adaLN_modulation/alpha", r"blocks.{}.adaLN_modulation.1.alphas"),
        (r"blocks/adaLN_modulation/norm/scale", r"blocks.{}.adaLN_modulation.2.weight"),
    ),
}
# DiT keeps q, k and v in one tensor, one under the other. Each is a matrix of its own to the quantiser, as in TerDiT.
_PARTS = {"wq": 0, "wk": 1, "wv": 2}
POSITIONS = "pos_embed"  # DiT's table of fixed positions, (1, T, D), which files hold and nothing trains


def published_name(path: str, family: str) -> str:
    """The published name of a parameter path, with `{}` for the layer's number in a block's."""
    for pattern, name in _NAMES[family]:
        match = re.fullmatch(pattern, path)
        if match:
            return match.expand(name)
    raise ValueError(f"{path} has no published name")


@dataclasses.dataclass(frozen=True)
class StateDict:
    """A published state dict, one tensor of it in memory at a time: `layout` says what there is, `read` reads it."""

    layout: Layout
    read: Callable[[str], np.ndarray]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "StateDict":
        """The state dict of arrays that are in memory, or mapped, already."""
        return cls({name: (array.dtype, array.shape) for name, array in arrays.items()}, arrays.__getitem__)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter tree and the published tensors it is made of: one, or one a layer where `name` has {}.

    It may be a part of them: their rows from part * tensor_shape[0] on.
    """

    path: str
    name: str
    shape: tuple[int, ...]  # of the leaf
    tensor_shape: tuple[int, ...]  # of one published tensor, or of its part, with alphas as (1,)
    depth: int | None  # layers, which we stack on axis 0
    ternary: bool
    part: int = 0
    parts: int = 1

    @property
    def rows(self) -> slice:
        """The leaf's rows of a whole tensor."""
        return slice(self.part * self.tensor_shape[0], (self.part + 1) * self.tensor_shape[0])

    @property
    def names(self) -> list[str]:
        return [self.name] if self.depth is None else [self.name.format(i) for i in range(self.depth)]

    def stored(self, packed: bool) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape of a whole published tensor, ternary weights as 2-bit planes if `packed`."""
        rows, *rest = self.parts * self.tensor_shape[0], *self.tensor_shape[1:]
        if packed and self.ternary:
            return np.dtype(np.uint8), (rows // CODES_PER_BYTE, *rest)
        return np.dtype(np.float32), (rows, *rest)


@lru_cache(maxsize=64)
def model_leaves(config: DiTConfig) -> tuple[Leaf, ...]:
    """The leaves of a model, those that stay full precision first; from shapes alone."""
    leaves = []
    for path, target in params_leaves(abstract_params(config)):
        name = published_name(path, config.family)
        stacked = "{}" in name
        shape = (target.shape[1:] if stacked else target.shape) or (1,)
        if name == "x_embedder.proj.weight":  # a convolution to DiT
            shape = (shape[0], config.in_channels, config.patch_size, config.patch_size)
        ternary = config.ternary and stacked and path.endswith("/weight")
        part = _PARTS.get(path.split("/")[-2]) if ".qkv." in name else None
        parts = (0, 1) if part is None else (part, len(_PARTS))
        leaves.append(Leaf(path, name, target.shape, shape, config.depth if stacked else None, ternary, *parts))
    return tuple(sorted(leaves, key=lambda leaf: leaf.ternary))


def constants(config: DiTConfig) -> dict[str, np.ndarray]:
    """The tensors of a published state dict that hold no parameter."""
    if config.family != "dit":
        return {}
    return {POSITIONS: sincos_2d_table(config.grid_size, config.hidden_size)[None]}


def published_layout(config: DiTConfig, packed: bool) -> Layout:
    """Every tensor of a model's published state dict, in the order in which `published_tensors` yields them."""
    layout = {name: (array.dtype, array.shape) for name, array in constants(config).items()}
    complete = (leaf for leaf in model_leaves(config) if leaf.part == leaf.parts - 1)
    return layout | {name: leaf.stored(packed) for leaf in complete for name in leaf.names}


def check_layout(config: DiTConfig, layout: Layout) -> None:
    """Compares names, shapes and dtypes with the model's before a tensor is read.

    Raises:
      UserError: naming a tensor that is missing, that the model does not have, or that has another shape or dtype.
    """
    plain, packed = (published_layout(config, packed) for packed in (False, True))
    for name in plain:
        if name not in layout:
            raise UserError(f"checkpoint lacks tensor {name!r} that this model needs")
        dtype, shape = layout[name]
        _, wanted = (packed if dtype == np.uint8 else plain)[name]
        if shape != wanted and (shape or (1,)) != wanted:
            raise UserError(f"checkpoint tensor {name!r} has shape {shape}, this model needs {wanted}")
        if dtype not in FLOATS and not dtype == packed[name][0] == np.uint8:
            raise UserError(f"checkpoint tensor {name!r} is {dtype}, this model cannot use that")
    if unused := layout.keys() - plain.keys():
        raise UserError(f"checkpoint tensor {min(unused)[:60]!r} does not belong to this model ({len(unused)} such)")


def read_leaves(config: DiTConfig, state_dict: StateDict) -> Iterator[tuple[str, np.ndarray]]:
    """The model's leaves from a published state dict, layers stacked on axis 0.

    Yields:
      (path, leaf): float32, or (L, out, in / 4) uint8 of `terdit_jax.ternary.packing.pack` where the state dict holds
      2-bit planes.

    Raises:
      UserError: as `check_layout`; a value that is not finite, or a bit pair that stands for no ternary value; another
        table of positions than DiT's.
    """
    check_layout(config, state_dict.layout)
    for name, array in constants(config).items():
        tensor = np.asarray(state_dict.read(name))
        expected = array.astype(tensor.dtype).astype(np.float32)  # as files in half precision have it
        if not np.allclose(tensor.astype(np.float32), expected, rtol=0, atol=1e-6):
            raise UserError(f"checkpoint tensor {name!r} is not the fixed table of 2-D positions that this model has")
    for leaf in model_leaves(config):
        tensors = [_read(state_dict, name, leaf) for name in leaf.names]
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise UserError(f"checkpoint tensors {leaf.name!r} are packed in some layers and not in others")
        array = tensors[0] if leaf.depth is None else np.stack(tensors)
        yield leaf.path, array if array.dtype == np.uint8 else array.reshape(leaf.shape)


def _read(state_dict: StateDict, name: str, leaf: Leaf) -> np.ndarray:
    """A leaf's part of a tensor, 2-bit planes in the layout of `pack`."""
    tensor = np.asarray(state_dict.read(name))
    if tensor.dtype == np.uint8:
        if holds_unused_code(tensor):
            raise UserError(f"checkpoint tensor {name!r} holds the 2-bit code 11, which stands for no ternary value")
        return planes_to_packed(tensor)[leaf.rows]
    with np.errstate(over="ignore"):  # float64 beyond float32 is not finite here
        tensor = tensor.reshape(leaf.stored(packed=False)[1])[leaf.rows].astype(np.float32, copy=False)
    check_values(tensor, f"checkpoint tensor {name!r}")
    return tensor


def check_values(array: np.ndarray, what: str) -> None:
    """Raises UserError if a parameter holds a number that no model can compute with."""
    if not max(array.max(), -array.min()) <= LARGEST:  # NaN is the maximum of what holds it
        raise UserError(f"{what} holds values that are not finite, or beyond 2**40")


def published_tensors(config: DiTConfig, leaves: Leaves) -> Iterator[tuple[str, np.ndarray]]:
    """The published tensors of leaves in memory, one leaf at a time (three for DiT's q, k and v): packed weights as
    2-bit planes, the rest as it is.

    Yields:
      (name, array): the tensors that hold no parameter, then every tensor of every leaf given, in that order.
    """
    yield from constants(config).items()
    known, parts = {leaf.path: leaf for leaf in model_leaves(config)}, dict[str, dict[int, np.ndarray]]()
    for path, array in leaves:
        leaf, array = known[path], np.asarray(array)
        parts.setdefault(leaf.name, {})[leaf.part] = array if leaf.depth else array[None]
        if len(parts[leaf.name]) < leaf.parts:
            continue
        for name, *layer in zip(leaf.names, *(part for _, part in sorted(parts.pop(leaf.name).items())), strict=True):
            layer = [part if part.dtype == np.uint8 else part.reshape(leaf.tensor_shape) for part in layer]
            whole = layer[0] if leaf.parts == 1 else np.concatenate(layer)
            yield name, packed_to_planes(whole) if whole.dtype == np.uint8 else whole


def params_tree(leaves: Leaves) -> dict:
    """The nested dict of leaves given by path."""
    return unflatten_dict(dict(leaves), sep="/")


def params_leaves(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of a nested dict by path; the inverse of `params_tree`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield path_name(path), leaf
