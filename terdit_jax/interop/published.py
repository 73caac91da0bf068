"""The names and layouts of TerDiT's and Large-DiT's published state dicts, to and from our parameter tree.

It maps arrays already in memory; reading and writing files is left to its callers. PyTorch is not needed.
"""

from collections.abc import Iterator, Mapping
import re

import jax
import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import abstract_params
from terdit_jax.parallel.sharding import path_name
from terdit_jax.ternary.packing import unpack_planes

# Our path -> the published name; `{}` takes the layer's number, which we keep on axis 0.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"x_embedder/(weight|bias)", r"x_embedder.\1"),
    (r"t_embedder/mlp_in/(weight|bias)", r"t_embedder.mlp.0.\1"),
    (r"t_embedder/mlp_out/(weight|bias)", r"t_embedder.mlp.2.\1"),
    (r"y_embedder/embedding_table", r"y_embedder.embedding_table.weight"),
    (r"blocks/(attention_norm|ffn_norm)/scale", r"layers.{}.\1.weight"),
    (r"blocks/(attention|feed_forward)/(w[qkvo123])/weight", r"layers.{}.\1.\2.weight"),
    (r"blocks/(attention|feed_forward)/(w[qkvo123])/alpha", r"layers.{}.\1.\2.alphas"),
    (r"blocks/attention/(q|k)_norm/scale", r"layers.{}.attention.\1_norm.weight"),
    (r"blocks/attention/(q|k)_norm/bias", r"layers.{}.attention.\1_norm.bias"),
    (r"blocks/adaLN_modulation/(weight|bias)", r"layers.{}.adaLN_modulation.1.\1"),
    (r"blocks/adaLN_modulation/alpha", r"layers.{}.adaLN_modulation.1.alphas"),
    (r"blocks/adaLN_modulation/norm/scale", r"layers.{}.adaLN_modulation.2.weight"),
    (r"final_layer/adaLN_modulation/(weight|bias)", r"final_layer.adaLN_modulation.1.\1"),
    (r"final_layer/linear/(weight|bias)", r"final_layer.linear.\1"),
)


def published_name(path: str) -> str:
    """The published name of a parameter path, with `{}` for the layer's number in a block's."""
    for pattern, name in _NAMES:
        match = re.fullmatch(pattern, path)
        if match:
            return match.expand(name)
    raise ValueError(f"{path} has no published name")


def params_from_published(config: DiTConfig, tensors: Mapping[str, np.ndarray]) -> dict:
    """Our parameter tree from a published state dict, float32.

    Packed weights (uint8 planes) become float32 matrices of -1, 0 and 1: ternarising those gives the same codes
    again, so the model computes what the checkpoint's did.

    Args:
      config: the architecture.
      tensors: name -> array; `*.weight` of a ternary map may be master weights or packed planes.

    Raises:
      UserError: a tensor that is missing, that the model does not have, that has another shape, or whose packed
        codes are none.
    """
    unused = set(tensors)

    def take(name: str, shape: tuple[int, ...], packable: bool) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"checkpoint lacks tensor {name!r} that this model needs")
        unused.discard(name)
        array = np.asarray(tensors[name])
        if packable and array.dtype == np.uint8:
            array = unpack_planes(array)
            if array.max(initial=0) > 1:
                raise UserError(
                    f"checkpoint tensor {name!r} holds the 2-bit code 11, which stands for no ternary value"
                )
        elif name.endswith(".alphas") and array.shape == (1,):
            array = array[0]
        if array.shape != shape:
            raise UserError(f"checkpoint tensor {name!r} has shape {array.shape}, this model needs {shape}")
        return array.astype(np.float32)

    def leaf(path: tuple, target: jax.ShapeDtypeStruct) -> np.ndarray:
        name = published_name(path_name(path))
        if "{}" not in name:
            return take(name, target.shape, packable=False)
        packable = config.ternary and path_name(path).endswith("/weight")
        return np.stack([take(name.format(i), target.shape[1:], packable) for i in range(config.depth)])

    params = jax.tree_util.tree_map_with_path(leaf, abstract_params(config))
    if unused:
        raise UserError(f"checkpoint tensor {min(unused)!r} does not belong to this model ({len(unused)} such)")
    return params


def published_tensors(config: DiTConfig, params: dict) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of the published full-precision layout, master weights as they are, one leaf at a time."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, array = published_name(path_name(path)), np.asarray(leaf)
        if "{}" not in name:
            yield name, array
            continue
        for i in range(config.depth):
            yield name.format(i), array[i].reshape(1) if name.endswith(".alphas") else array[i]
