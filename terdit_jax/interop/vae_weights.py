"""The Stable Diffusion autoencoder as diffusers writes it, config.json and the weights beside it: a folder or a name.

Every field, name, shape and value is checked. `model.vae` has the network; `hub` downloads.
"""

from collections.abc import Mapping
from functools import partial
import hashlib
import os
from pathlib import Path
import re
import reprlib
from typing import Any

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.interop.hub import fetch, is_name
from terdit_jax.interop.published import FLOATS, params_leaves, params_tree
from terdit_jax.interop.safetensors import open_container
from terdit_jax.interop.torch_file import load_state_dict
from terdit_jax.model.vae import VAEConfig, abstract_params
from terdit_jax.paths import local_path
from terdit_jax.untrusted import is_count, is_number, parse_json

CONFIG = "config.json"
SAFETENSORS = "diffusion_pytorch_model.safetensors"
TORCH = "diffusion_pytorch_model.bin"
_MAX_CONFIG_BYTES = 1 << 16
# Sizes that config.json gives, with the default of diffusers where it may leave one out, and the largest that is taken.
_SIZES = {
    "in_channels": (3, 1 << 10), "out_channels": (3, 1 << 10), "layers_per_block": (1, 16),
    "latent_channels": (4, 1 << 10), "norm_num_groups": (32, 1 << 14), "sample_size": (32, 1 << 14),
}  # fmt: skip
_MAX_BLOCKS, _MAX_WIDTH = 8, 1 << 14
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# What else config.json may say, with the one value that makes the network that is implemented.
_FIXED = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True,
    "mid_block_add_attention": True, "shift_factor": None, "latents_mean": None, "latents_std": None,
}  # fmt: skip
_IGNORED = ("force_upcast",)  # of half precision in PyTorch
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_NAME = re.compile(r"(?<=\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")


def load_vae(path: str | os.PathLike) -> tuple[VAEConfig, dict]:
    """The autoencoder in a folder: `config.json` with `diffusion_pytorch_model.safetensors`, or `.bin` if that is all.

    The attention's maps may have diffusers' older names (query, key, value, proj_attn) or today's (to_q, to_k, to_v,
    to_out.0), and be matrices or 1x1 convolutions.

    Args:
      path: the folder; or, where there is no such folder, a name on the Hub (`hub.fetch`), such as
        stabilityai/sd-vae-ft-ema.

    Returns:
      The configuration and the parameters, a nested dict of float32 NumPy arrays as `abstract_params` describes.

    Raises:
      UserError: a file that cannot be had or read, another architecture, a tensor that is missing, unknown, of another
        shape or not finite.
    """
    folder = local_path(path)
    if not folder.is_dir():
        if folder.exists() or not is_name(path):
            raise UserError(f"{folder} is no folder: give the one that holds the autoencoder's {CONFIG}")
        folder = fetch(os.fspath(path), partial(_choose, os.fspath(path))).parent
    config = _read_config(folder / CONFIG)
    if (folder / SAFETENSORS).exists():
        source, arrays = folder / SAFETENSORS, open_container(folder / SAFETENSORS).arrays
    elif (folder / TORCH).exists():
        source, arrays = folder / TORCH, load_state_dict(folder / TORCH)
    else:
        raise UserError(f"{folder} has neither {SAFETENSORS} nor {TORCH}")
    return config, _convert(config, arrays, str(source))


def _choose(source: str, names: list[str], asked: str) -> list[str]:
    """The files of an autoencoder on the Hub, of those in its folder."""
    weights = TORCH if TORCH in names and SAFETENSORS not in names else SAFETENSORS
    if missing := {CONFIG, weights} - {*names}:
        raise UserError(f"{source} has no {min(missing)} on the Hugging Face Hub: is it an autoencoder?")
    return [CONFIG, weights]


def vae_identity(config: VAEConfig, params: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that tell this autoencoder from any other, whatever file it came from.

    The head of a SHA-256 over what decides the network's numbers: the norms' number of groups, then for each parameter,
    in the order of their names (diffusers' of today), its name, its shape and its float32 bytes in PyTorch's layout.
    335 MB are hashed, in 0.4 s on one core.

    Args:
      config: the architecture.
      params: float32 arrays, as `load_vae` returns them.
    """
    digest = hashlib.sha256(f"groups={config.norm_num_groups}".encode())
    for name, leaf in sorted((path.replace("/", "."), leaf) for path, leaf in params_leaves(params)):
        array = np.asarray(leaf, "<f4")
        array = np.ascontiguousarray(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array)
        digest.update(f"\n{name} {','.join(map(str, array.shape))}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()[:12]


def parse_config(fields: Mapping[str, Any], source: str) -> VAEConfig:
    """The configuration that diffusers' JSON describes; `source` names it in errors.

    Raises:
      UserError: an impossible value, or one that asks for another network than ours.
    """

    def require(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise UserError(f"{source}: {name}={reprlib.repr(fields.get(name))}: {what}")

    widths = fields.get("block_out_channels", [64])
    require(
        isinstance(widths, list)
        and 0 < len(widths) <= _MAX_BLOCKS
        and all(is_count(width, 1, _MAX_WIDTH) for width in widths),
        "block_out_channels",
        f"must list 1 to {_MAX_BLOCKS} widths of at most {_MAX_WIDTH}",
    )
    sizes = {name: fields.get(name, default) for name, (default, _) in _SIZES.items()}
    for name, (_, largest) in _SIZES.items():
        require(is_count(sizes[name], 1, largest), name, f"must be an integer from 1 to {largest}")
    groups = sizes["norm_num_groups"]
    require(all(width % groups == 0 for width in widths), "norm_num_groups", f"does not divide the widths {widths}")
    scale = fields.get("scaling_factor", VAEConfig.scaling_factor)
    require(is_number(scale, 1e-6, 1e6), "scaling_factor", "must be a positive number")
    for name, kind in _BLOCK_TYPES.items():
        require(fields.get(name, [kind]) == [kind] * len(widths), name, f"only {len(widths)} {kind} are supported")
    known = ("block_out_channels", "scaling_factor", *_SIZES, *_BLOCK_TYPES, *_IGNORED)
    for name in fields:
        if name in _FIXED:
            same = type(fields[name]) is type(_FIXED[name]) and fields[name] == _FIXED[name]
            require(same, name, f"only {_FIXED[name]} is supported")
        elif not name.startswith("_") and name not in known:
            raise UserError(f"{source}: field {name[:60]!r} is unknown here and may ask for another network")
    return VAEConfig(block_out_channels=tuple(widths), scaling_factor=float(scale), **sizes)


def _read_config(path: Path) -> VAEConfig:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) > _MAX_CONFIG_BYTES:
        raise UserError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes: not a configuration of diffusers")
    return parse_config(parse_json(content, str(path), dict), str(path))


def _convert(config: VAEConfig, arrays: Mapping[str, np.ndarray], source: str) -> dict:
    """The parameter tree of PyTorch's tensors; all names and shapes are compared before a number is read."""
    targets = {path.replace("/", "."): leaf.shape for path, leaf in params_leaves(abstract_params(config))}
    names: dict[str, str] = {}  # ours -> the file's
    for name in arrays:
        known = _OLD_ATTENTION_NAME.sub(lambda match: _OLD_ATTENTION[match[0]], name)
        if known not in targets:
            raise UserError(f"{source}: tensor {name[:60]!r} does not belong to this autoencoder")
        if known in names:
            raise UserError(f"{source}: tensors {names[known]!r} and {name!r} are the same parameter")
        names[known] = name
    for known, target in targets.items():
        if known not in names:
            raise UserError(f"{source}: lacks tensor {known!r}")
        array, wanted = arrays[names[known]], _torch_shape(target)
        # The attention's maps were 1x1 convolutions once.
        if array.shape != wanted and not (len(target) == 2 and array.shape == (*wanted, 1, 1)):
            raise UserError(f"{source}: tensor {names[known]!r} has shape {array.shape}, {CONFIG} asks for {wanted}")
        if array.dtype not in FLOATS:
            raise UserError(f"{source}: tensor {names[known]!r} holds {array.dtype}, not floating-point numbers")
    return params_tree(
        (known.replace(".", "/"), _read(arrays[names[known]], target, f"{source}: tensor {names[known]!r}"))
        for known, target in targets.items()
    )


def _read(array: np.ndarray, target: tuple[int, ...], what: str) -> np.ndarray:
    """A tensor as float32 in our layout, a copy."""
    with np.errstate(over="ignore"):  # float64 beyond float32 is not finite here
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{what} holds values that are not finite")
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if len(target) == 4 else array.reshape(target)


def _torch_shape(target: tuple[int, ...]) -> tuple[int, ...]:
    """Turns (out, height, width, in) of a convolution into PyTorch's (out, in, height, width)."""
    return (target[0], target[3], *target[1:3]) if len(target) == 4 else target
