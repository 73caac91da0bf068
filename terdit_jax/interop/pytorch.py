"""TerDiT and Large-DiT for PyTorch in one file that imports only torch: the network, its loader and its sampler.

Copy it wherever it is needed. Training, other samplers and autoencoders are left to others.

    model = load("digits.safetensors", device="cuda")
    images = to_images(sample(model, labels=range(10)), model.description["latent_scale"])

Sources: TerDiT (arXiv 2405.14854), DiT (arXiv 2212.09748), RoFormer (arXiv 2104.09864), DDPM (arXiv 2006.11239), DDIM
(arXiv 2010.02502), learned variances (arXiv 2102.09672), classifier-free guidance (arXiv 2207.12598).
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
import contextlib
from functools import partial
import hashlib
import json
import math
import mmap
import operator
import os
from pathlib import Path
from typing import Any
import zlib

import torch
from torch import Tensor, nn
import torch.nn.functional as F

__all__ = ["TerDiT", "load", "sample", "to_images"]

_INTEGERS = ("input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads", "num_kv_heads",
             "ffn_multiple_of", "num_classes")  # fmt: skip
_FLAGS = ("ternary", "qk_norm", "adaln_rms_norm")
_OF_TRAINING = ("class_dropout_prob", "alpha_init")  # described, but of no consequence here
_ADDED = {"family": "large_dit", "learn_sigma": True}  # fields that older files lack, and what they then are
_POSITIONS = ("rope_1d", "rope_1d_sincos_2d")
_MAX_TOKENS, _MAX_FIELD = 2**16, 2**20  # a description is not to be trusted with our memory
_SHIFTS = (6, 4, 2, 0)  # the first quarter of a weight's rows lies in the highest bits of its planes


class TerDiT(nn.Module):
    """A ternary diffusion transformer, or Large-DiT, its full-precision twin, where `fields["ternary"]` is off.

    Its parameters and buffers have the names of the published checkpoints, whose state dicts load as they are. A fresh
    one's weights mean nothing. It is for inference: rounding has no gradient, and packed weights cannot move.

    Attributes: `fields`, the architecture; `dtype`; `description`, what the file said of the model, or None.
    """

    frequencies: Tensor
    rope: Tensor
    positions: Tensor

    def __init__(self, fields: Mapping, *, dtype: torch.dtype = torch.bfloat16, packed: bool = True):
        """Args:
          fields: ternary, input_size, in_channels, patch_size, hidden_size, depth, num_heads, num_kv_heads,
            ffn_multiple_of, num_classes, qk_norm, positions ("rope_1d" or "rope_1d_sincos_2d"), adaln_rms_norm.
          dtype: torch.float32 or torch.bfloat16, of the blocks' activations and matmuls. Norms, the condition and the
            output are float32 in both.
          packed: keep the blocks' weights as they are stored (2-bit planes; float32 in Large-DiT) and turn them into
            `dtype` at each use; otherwise do so once, when a state dict is loaded.

        Raises:
          ValueError: fields or a dtype that make no model.
        """
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}: give torch.float32 or torch.bfloat16")
        _check_fields(fields)
        self.fields, self.dtype, self.packed = dict(fields), dtype, packed
        self.description: dict | None = None
        channels, patch, width = fields["in_channels"], fields["patch_size"], fields["hidden_size"]
        condition = min(width, 1024)
        self.x_embedder = _RoundedLinear(patch**2 * channels, width, dtype)
        mlp = nn.Sequential(nn.Linear(256, condition), nn.SiLU(), nn.Linear(condition, condition))
        # One row a class, and the last for the null class that guidance subtracts.
        table = nn.Embedding(fields["num_classes"] + 1, condition)
        self.t_embedder, self.y_embedder = nn.ModuleDict({"mlp": mlp}), nn.ModuleDict({"embedding_table": table})
        self.layers = nn.ModuleList(_Block(fields, dtype, packed) for _ in range(fields["depth"]))
        head = {
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * width)),
            "linear": _RoundedLinear(width, patch**2 * 2 * channels, dtype),
        }
        self.final_layer = nn.ModuleDict(head)
        self._make_tables(torch.get_default_device())

    def _make_tables(self, device: torch.device | str) -> None:
        """Fixed tables, worked out in float64: frequencies of the timestep, angles of RoPE, absolute positions."""
        fields = self.fields
        home = "meta" if torch.device(device).type == "meta" else "cpu"  # where unchecked fields cost no memory
        width, head_dim = fields["hidden_size"], fields["hidden_size"] // fields["num_heads"]
        grid = fields["input_size"] // fields["patch_size"]
        place = torch.arange(grid**2, dtype=torch.float64, device=home)
        angles = torch.outer(place, _falling(head_dim // 2, home))
        tables = {"frequencies": _falling(128, home), "rope": torch.stack([angles.cos(), angles.sin()])[:, :, None]}
        if fields["positions"] == "rope_1d_sincos_2d":
            column, row = (torch.outer(axis, _falling(width // 4, home)) for axis in (place % grid, place // grid))
            tables["positions"] = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)
        for name, table in tables.items():
            self.register_buffer(name, table.to(device, torch.float32), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predicts the noise in x and the interpolation of the variance.

        Args:
          x: (B, C, H, W) float noisy latents, or pixels.
          t: (B,) timesteps in [0, 1000).
          y: (B,) int64 classes; num_classes is the null class.

        Returns:
          (B, 2C, H, W) float32: the noise, then the interpolation.
        """
        patch, grid = self.fields["patch_size"], self.fields["input_size"] // self.fields["patch_size"]
        x = x.unflatten(3, (grid, patch)).unflatten(2, (grid, patch))  # (B, C, g, p, g, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, C p p)
        x = self.x_embedder(x)
        if self.fields["positions"] == "rope_1d_sincos_2d":
            x = x + self.positions
        x = x.to(self.dtype)
        angles = t.float()[:, None] * self.frequencies
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], 1))
        c = c + self.y_embedder["embedding_table"](y)  # (B, C') float32: every modulation depends on it
        for layer in self.layers:
            x = layer(x, c, self.rope)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        # Rounded to `dtype`, as the norms of the blocks are, before it is modulated in float32.
        x = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(self.dtype).float() * (1 + scale) + shift
        x = self.final_layer["linear"](x)
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))  # (B, g, g, p, p, 2C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class _Block(nn.Module):
    """Attention and feed-forward, modulated by the condition and gated into the residual stream."""

    def __init__(self, fields: Mapping, dtype: torch.dtype, packed: bool):
        super().__init__()
        width = fields["hidden_size"]
        linear = partial(_BlockLinear, fields["ternary"], dtype, packed)
        self.attention = _Attention(fields, linear)
        mlp = _mlp_width(fields)
        maps = {"w1": linear(width, mlp), "w2": linear(mlp, width), "w3": linear(width, mlp)}
        self.feed_forward = nn.ModuleDict(maps)
        self.attention_norm, self.ffn_norm = _RMSNorm(width, eps=1e-5), _RMSNorm(width, eps=1e-5)
        adaln = [nn.SiLU(), linear(min(width, 1024), 6 * width, bias=True)]
        if fields["ternary"] and fields["adaln_rms_norm"]:
            adaln.append(_RMSNorm(6 * width, eps=1e-5))
        self.adaLN_modulation = nn.Sequential(*adaln)

    def forward(self, x: Tensor, c: Tensor, rope: Tensor) -> Tensor:
        """Maps x (B, T, D) and the condition c (B, C'), float32, to (B, T, D)."""
        modulation = self.adaLN_modulation(c).to(x.dtype)[:, None].chunk(6, -1)
        shift, scale, gate = modulation[:3]
        x = x + gate * self.attention(self.attention_norm(x) * (1 + scale) + shift, rope)
        shift, scale, gate = modulation[3:]
        hidden, w = self.ffn_norm(x) * (1 + scale) + shift, self.feed_forward
        return x + gate * w["w2"](F.silu(w["w1"](hidden)) * w["w3"](hidden))  # SwiGLU


class _Attention(nn.Module):
    """Attention over all tokens; optional norms over the whole of q and k, RoPE over the token's index, grouped kv."""

    def __init__(self, fields: Mapping, linear: Callable[[int, int], nn.Module]):
        super().__init__()
        width, self.head_dim = fields["hidden_size"], fields["hidden_size"] // fields["num_heads"]
        kv_width = fields["num_kv_heads"] * self.head_dim
        self.wq, self.wk, self.wv = linear(width, width), linear(width, kv_width), linear(width, kv_width)
        self.wo = linear(width, width)
        self.grouped = kv_width < width
        self.q_norm = _LayerNorm(width, eps=1e-5) if fields["qk_norm"] else nn.Identity()
        self.k_norm = _LayerNorm(kv_width, eps=1e-5) if fields["qk_norm"] else nn.Identity()

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Maps x (B, T, D) to (B, T, D); rope is (2, T, 1, head_dim / 2)."""
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (a.unflatten(2, (-1, self.head_dim)) for a in (q, k, v))  # (B, T, heads, head_dim)
        q, k, v = (a.transpose(1, 2) for a in (_rotate(q, rope), _rotate(k, rope), v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped)
        return self.wo(out.transpose(1, 2).flatten(2))


class _BlockLinear(nn.Module):
    """A linear map of a block: weight (out, in), or (out / 4, in) uint8 planes and alphas (1,) float32 if ternary."""

    def __init__(self, ternary: bool, dtype: torch.dtype, packed: bool, width_in: int, width_out: int, bias=False):
        super().__init__()
        self.dtype, self.packed = dtype, packed
        if ternary and packed:
            self.register_buffer("weight", torch.full((width_out // 4, width_in), 0b01010101, dtype=torch.uint8))
        elif ternary:
            self.register_buffer("weight", torch.zeros(width_out, width_in, dtype=dtype))
        else:
            self.weight = nn.Parameter(torch.zeros(width_out, width_in, dtype=torch.float32 if packed else dtype))
        self.alphas = nn.Parameter(torch.ones(1)) if ternary else None
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        name = prefix + "weight"
        if not self.packed and name in state_dict:
            state_dict[name] = _unpacked(state_dict[name], self.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out) in `dtype`, or in float32 where there is a bias to add."""
        y = F.linear(x.to(self.dtype), _unpacked(self.weight, self.dtype))
        if self.alphas is not None:
            # Codes are exact in every float dtype; scaled in float32 after the sum, only activations round.
            y = (y.float() * self.alphas).to(self.dtype)
        return y if self.bias is None else y.float() + self.bias


class _RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        """Normalises in float32: squares overflow the precision of bfloat16."""
        return super().forward(x.float()).to(x.dtype)


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        """Normalises in float32: the variance is a difference of large sums."""
        return super().forward(x.float()).to(x.dtype)


class _RoundedLinear(nn.Linear):
    def __init__(self, width_in: int, width_out: int, dtype: torch.dtype):
        super().__init__(width_in, width_out)
        self.rounded_to = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Rounds x and the weight to a dtype; sums their products, and returns them, in float32."""
        x, weight = (a.to(self.rounded_to).float() for a in (x, self.weight))
        return F.linear(x, weight, self.bias)


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns interleaved pairs of (B, T, heads, head_dim) in float32: bfloat16 angles would lose whole positions."""
    even, odd = x.float().unflatten(3, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3).to(x.dtype)


def _falling(count: int, device: str) -> Tensor:
    """Frequencies 1e4^(-i / count), (count,) float64."""
    return 1e4 ** (-torch.arange(count, dtype=torch.float64, device=device) / count)


def _mlp_width(fields: Mapping) -> int:
    multiple = fields["ffn_multiple_of"]
    return math.ceil(int(8 * fields["hidden_size"] / 3) / multiple) * multiple


def _unpacked(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as matmuls read it: planes (out / 4, in) unpacked to (out, in) codes -1, 0 and 1; floats as they are."""
    if weight.dtype != torch.uint8:
        return weight.to(dtype)
    return torch.cat([(weight >> shift & 3).to(dtype) - 1 for shift in _SHIFTS])


def _ternary_planes(weight: Tensor) -> Tensor:
    """Master weights (out, in) -> (out / 4, in) planes of clip(round(W / (mean|W| + 1e-6)), -1, 1), half to even."""
    weight = weight.float()
    codes = (weight / (weight.abs().mean() + 1e-6)).round_().clamp_(-1, 1).add_(1).to(torch.uint8)
    planes = [quarter << shift for quarter, shift in zip(codes.chunk(4), _SHIFTS, strict=True)]
    return planes[0] | planes[1] | planes[2] | planes[3]


def _check_fields(fields: Mapping) -> None:
    needed = {*_INTEGERS, *_FLAGS, "positions"}
    for name, value in _ADDED.items():
        if fields.get(name, value) != value:
            raise ValueError(f"the model's field {name}={fields[name]!r}: this module takes {value!r} alone")
    if wrong := sorted(needed ^ (fields.keys() - {*_OF_TRAINING, *_ADDED})):
        raise ValueError(f"the model's field {wrong[0]!r} is {'missing' if wrong[0] in needed else 'unknown'}")
    for name in _INTEGERS:
        if type(fields[name]) is not int or not 0 < fields[name] <= _MAX_FIELD:
            raise ValueError(f"the model's field {name}={fields[name]!r}: must be an integer in 1..{_MAX_FIELD}")
    for name in _FLAGS:
        if type(fields[name]) is not bool:
            raise ValueError(f"the model's field {name}={fields[name]!r}: must be true or false")
    if fields["positions"] not in _POSITIONS:
        raise ValueError(f"the model's field positions={fields['positions']!r}: choose one of {', '.join(_POSITIONS)}")
    size, patch, width = fields["input_size"], fields["patch_size"], fields["hidden_size"]
    heads, kv_heads = fields["num_heads"], fields["num_kv_heads"]
    if size % patch or (size // patch) ** 2 > _MAX_TOKENS:
        raise ValueError(f"patches of {patch} do not cut {size} x {size} into at most {_MAX_TOKENS} tokens")
    if width % (2 * heads) or width % 4 or heads % kv_heads:
        raise ValueError(f"hidden_size={width}, num_heads={heads}, num_kv_heads={kv_heads} do not divide into heads")
    if fields["ternary"] and (_mlp_width(fields) % 4 or width // heads * kv_heads % 4):
        raise ValueError("the widths of k, v and the feed-forward must be multiples of 4 to be packed")


def load(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, packed: bool = True
) -> TerDiT:
    """Reads a model, checking every byte that has a checksum and every name, shape and value.

    Args:
      path: an artifact (.safetensors); a plain safetensors export with its description; a PyTorch export or published
        checkpoint, as a directory or as one .pth file beside its model_args.pth. A directory's averaged weights come
        before the others, and ternary files before full precision. Nothing in a file is ever run.
      device: where the model goes.
      dtype: as for `TerDiT`.
      packed: as for `TerDiT`. Then `state_dict()` is, bit for bit, the float32 and uint8 tensors of the file. Float
        weights of a ternary map are master weights: they are ternarised by the absmean rule in either mode.

    Returns:
      The model in eval mode, without gradients.

    Raises:
      ValueError: a file of another kind, damaged, or that does not fit its description; one line.
      OSError: a path that cannot be read.
    """
    path = Path(os.path.expanduser(path))
    try:
        tensors, fields, description = _read(path)
        depth = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
        if depth != fields.get("depth"):  # before anything is built by the description alone
            raise ValueError(f"has {depth} layers, its description says {fields.get('depth')}")
        with torch.device("meta"):
            model, published = TerDiT(fields, dtype=dtype, packed=packed), TerDiT(fields).state_dict()
        model.load_state_dict(_fitting(tensors, published, device), assign=True)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    model._make_tables(device)
    model.description = description
    return model.requires_grad_(False).eval()


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST = 2.0**40  # of parameters: squares of what larger ones make overflow float32 in the norms
_DTYPES = _FLOATS | {"U8": torch.uint8}


def _fitting(tensors: Mapping[str, Tensor], published: Mapping[str, Tensor], device: str | torch.device) -> dict:
    """The tensors on the device, ternarised where they are master weights, having compared them with the model's."""
    if missing := published.keys() - tensors.keys():
        raise ValueError(f"lacks tensor {min(missing)!r} that this model needs ({len(missing)} such)")
    if unknown := tensors.keys() - published.keys():
        raise ValueError(f"has tensor {min(unknown)!r} that does not belong to this model ({len(unknown)} such)")
    fitting = {}
    for name, target in published.items():
        tensor, shape, ternary = tensors[name], tuple(target.shape), target.dtype == torch.uint8
        planes = ternary and tensor.dtype == torch.uint8
        if ternary and not planes:
            shape = (4 * shape[0], shape[1])
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, this model needs {shape}")
        if not planes and tensor.dtype not in _FLOATS.values():
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, this model needs {target.dtype}")
        if planes and (tensor & tensor >> 1 & 0b01010101).any():
            raise ValueError(f"tensor {name!r} holds the 2-bit code 11, which stands for no ternary value")
        if not planes and not tensor.abs().max() <= _LARGEST:
            raise ValueError(f"tensor {name!r} holds values that are not finite, or beyond 2**40")
        tensor = _ternary_planes(tensor) if ternary and not planes else tensor.detach()
        fitting[name] = tensor.to(device, target.dtype, copy=True)  # never a view of the mapped file
    return fitting


def _read(path: Path) -> tuple[dict[str, Tensor], dict, dict | None]:
    """Reads (tensors, fields, description) of any kind of file; a published checkpoint has no description."""
    try:
        if path.is_dir():
            return _read_torch(path)
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _read_torch(path)
            return _read_safetensors(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its header or description is malformed: {type(error).__name__} {error}") from error


def _read_safetensors(view: mmap.mmap) -> tuple[dict[str, Tensor], dict, dict]:
    """An artifact, which is verified, or a plain export, which has no checksums."""
    length = int.from_bytes(view[:8], "little")
    if not 2 <= length <= min(len(view) - 8, 10**8) or view[8:9] != b"{":
        raise ValueError("is neither a safetensors file nor one of PyTorch's, or is cut short")
    header, data = view[8 : 8 + length], memoryview(view)[8 + length :]
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", {})
    if "description" not in metadata:
        raise ValueError("has no description: terdit_jax did not write it")
    if {key for key in metadata if (key, metadata[key]) != ("format", "pt")} != {"description"}:
        _unwrap(header, entries, metadata, data)
    tensors, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != end or not start < stop <= len(data):
            raise ValueError(f"tensor {name!r} is not where it should be: the file is damaged or cut short")
        tensors[name], end = _tensor(name, entry, data[start:stop]), stop
    if end != len(data):
        raise ValueError(f"has {len(data) - end} bytes after its last tensor")
    description = json.loads(metadata["description"])
    return tensors, dict(description["model"]), description


def _unwrap(header: bytes, entries: dict, metadata: dict, data: memoryview) -> None:
    """Verifies an artifact, and gives the entries of compressed tensors the dtype and shape that they inflate to."""
    if (metadata["format"], metadata["version"]) != ("terdit_jax", "1"):
        raise ValueError(f"has format {metadata['format']!r}, version {metadata['version']!r}, not terdit_jax 1")
    digest = metadata["header_sha256"]
    if hashlib.sha256(header.replace(digest.encode(), b"0" * 64, 1)).hexdigest() != digest:
        raise ValueError("fails the SHA-256 of its header: the file is damaged")
    hashes = json.loads(metadata["sha256"])
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        if hashlib.sha256(data[start:stop]).hexdigest() != hashes[name]:
            raise ValueError(f"tensor {name!r} fails its SHA-256: the file is damaged")
    for name, (dtype, shape) in json.loads(metadata["zlib"]).items():
        entries[name] |= {"dtype": dtype, "shape": shape, "zlib": True}


def _tensor(name: str, entry: dict, stored: memoryview | bytearray) -> Tensor:
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype not in _DTYPES or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError(f"tensor {name!r} has dtype {dtype} and shape {shape}, which no model has")
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if "zlib" in entry:
        if size > 2 * len(stored):
            raise ValueError(f"tensor {name!r} would expand from {len(stored)} to {size} bytes, more than twofold")
        stream = zlib.decompressobj()
        try:
            stored = bytearray(stream.decompress(stored, size + 1))
        except zlib.error as error:
            raise ValueError(f"tensor {name!r} is no zlib stream: {error}") from error
        if not stream.eof or stream.unused_data:
            raise ValueError(f"tensor {name!r} is not one whole zlib stream of {size} bytes")
    if len(stored) != size:
        raise ValueError(f"tensor {name!r} has {len(stored)} bytes, its shape needs {size}")
    return torch.frombuffer(stored, dtype=_DTYPES[dtype]).reshape(shape)


_PREFERENCE = ("consolidated_ema_ternary", "consolidated_ema", "consolidated_ternary", "consolidated")
_PUBLISHED = {  # width, layers, heads
    "DiT_Llama_600M_patch2": (1536, 16, 32),
    "DiT_Llama_3B_patch2": (3072, 32, 32),
    "DiT_Llama_7B_patch2": (4096, 32, 32),
}


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict, dict | None]:
    """An export or a published checkpoint: a state dict beside its model_args.pth."""
    files = [path / f"{stem}.00-of-01.pth" for stem in _PREFERENCE] if path.is_dir() else [path]
    weights = next((file for file in files if file.exists()), None)
    if weights is None:
        raise ValueError(f"holds none of {', '.join(file.name for file in files)}")
    if not (weights.parent / "model_args.pth").exists():
        raise ValueError("there is no model_args.pth beside the weights")
    args, tensors = _torch_load(weights.parent / "model_args.pth"), _torch_load(weights)
    if not isinstance(args, argparse.Namespace):
        raise ValueError(f"model_args.pth holds a {type(args).__name__}, not an argparse.Namespace")
    if not isinstance(tensors, dict) or not all(_is_plain(*item) for item in tensors.items()):
        raise ValueError(f"{weights.name} is no state dict")
    description = getattr(args, "terdit_jax", None)
    if description is not None:
        return tensors, dict(description["model"]), description
    if args.model not in _PUBLISHED:
        raise ValueError(f"model_args.pth names model {args.model!r}, not one of {', '.join(_PUBLISHED)}")
    width, depth, heads = _PUBLISHED[args.model]
    ternary = any(name.endswith(".alphas") for name in tensors)
    fields = {
        "ternary": ternary, "input_size": args.image_size // 8, "in_channels": 4, "patch_size": 2,
        "hidden_size": width, "depth": depth, "num_heads": heads, "num_kv_heads": heads, "ffn_multiple_of": 256,
        "num_classes": len(tensors["y_embedder.embedding_table.weight"]) - 1, "positions": "rope_1d",
        "qk_norm": "layers.0.attention.q_norm.weight" in tensors, "adaln_rms_norm": ternary,
    }  # fmt: skip
    return tensors, fields, None


def _is_plain(name: object, tensor: object) -> bool:
    if not (isinstance(name, str) and isinstance(tensor, Tensor)):
        return False
    return tensor.layout == torch.strided and tensor.device.type == "cpu"


def _torch_load(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds, some with pages of advice on loading what must not be loaded
        reason = f"{type(error).__name__} {error}".splitlines()[0][:160]
        raise ValueError(f"{path.name} cannot be read as plain tensors: {reason}") from error


def _class_of(label: Any) -> int:
    if not isinstance(label, bool) and getattr(label, "dtype", None) != torch.bool:
        with contextlib.suppress(TypeError):
            return operator.index(label)
    raise ValueError(f"labels must be whole numbers, got {label!r}")


_MAX_CFG_SCALE = 1000
_SAMPLE = {"method": "ddpm", "num_steps": 250, "cfg_scale": 4.0, "cfg_channels": 3}  # the published demo's


@torch.no_grad()
def sample(
    model: TerDiT,
    labels: Iterable[int] | Tensor,
    *,
    seed: int = 0,
    num_steps: int | None = None,
    cfg_scale: float | None = None,
    cfg_channels: int | None = None,
    method: str | None = None,
    first: int = 0,
) -> Tensor:
    """Draws an image for each label, all in one batch.

    Image i's noise depends on (seed, first + i) alone and is drawn on the CPU: neither device nor batch changes it.
    The latents of an autoencoder are decoded by diffusers: `AutoencoderKL.decode(latents / latent_scale).sample`,
    where latent_scale is 0.18215 for Stable Diffusion's.

    Args:
      model: of `load`; `model.compile()` it for speed.
      labels: N classes in [0, num_classes).
      seed: of all noise.
      num_steps: steps of the 1000 to take, 1 to 1000.
      cfg_scale: eps_null + cfg_scale * (eps_label - eps_null); 1 is no guidance and halves the work.
      cfg_channels: min(cfg_channels, C) channels of the noise are guided; 0: all.
      method: "ddpm", ancestral sampling with the learned variance, or "ddim", which is deterministic.
      first: the number of the first image, to draw a large set in several calls.

    Settings left out are the description's, or else 250 steps of ddpm, guided by 4.0 on 3 channels.

    Returns:
      (N, C, H, W) float32 on the model's device: latents, or the pixels of a pixel-space model.

    Raises:
      ValueError: labels or settings that cannot be, or a model of another objective than DDPM's.
    """
    described: dict[str, Any] = model.description or {}
    objective = described.get("diffusion", {}).get("objective", "ddpm")
    if objective != "ddpm":
        raise ValueError(f"the model's objective is {objective!r}: only ddpm models are sampled here")
    settings: dict[str, Any] = _SAMPLE | described.get("sample", {})
    given = {"method": method, "num_steps": num_steps, "cfg_scale": cfg_scale, "cfg_channels": cfg_channels}
    settings |= {name: value for name, value in given.items() if value is not None}
    method, num_steps, scale, mixed = (settings[name] for name in _SAMPLE)
    if method not in ("ddpm", "ddim"):
        raise ValueError(f"method is {method!r}: give 'ddpm' or 'ddim'")
    if type(num_steps) is not int or not 1 <= num_steps <= 1000:
        raise ValueError(f"num_steps is {num_steps!r}: give an integer from 1 to 1000")
    if type(scale) not in (int, float) or not 0 <= scale <= _MAX_CFG_SCALE:
        raise ValueError(f"cfg_scale is {scale!r}: give a number from 0 to {_MAX_CFG_SCALE}")
    if type(mixed) is not int or mixed < 0:
        raise ValueError(f"cfg_channels is {mixed!r}: give the number of guided channels, or 0 for all")
    device, null = next(model.parameters()).device, model.fields["num_classes"]
    labels = [_class_of(label) for label in labels]
    if not labels or not 0 <= min(labels) <= max(labels) < null:
        found = f"{min(labels)}..{max(labels)}" if labels else "none"
        raise ValueError(f"labels must be classes in 0..{null - 1}, got {found}")
    y = torch.tensor(labels, device=device)
    size, channels = model.fields["input_size"], model.fields["in_channels"]
    generators = [torch.Generator().manual_seed(_seed(seed, first + i)) for i in range(len(y))]

    def draw() -> Tensor:
        return torch.stack([torch.randn(channels, size, size, generator=g) for g in generators]).to(device)

    denoise = _guided(model, y, null, scale, mixed or channels)
    return _reverse(denoise, draw(), draw, _spaced(num_steps), method)


def to_images(x: Tensor, latent_scale: float) -> Tensor:
    """Pixels of a pixel-space model, (N, 1 or 3, H, W) float in [-latent_scale, latent_scale], as (N, H, W, C) uint8.

    What lies outside is clipped. Raises ValueError for another number of channels, since latents need their decoder,
    and for values that are not finite.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"shape {tuple(x.shape)} is not that of images: decode latents with their autoencoder")
    if bad := int((~x.isfinite()).flatten(1).any(1).sum()):
        raise ValueError(f"{bad} of {len(x)} images hold values that are not finite: is cfg_scale too large?")
    return ((x.float() / latent_scale + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _seed(seed: int, i: int) -> int:
    """32 bits, all that PyTorch's CPU generator reads: no two images of one seed share them, seeds start far apart."""
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
    return (start + i) % 2**32


def _guided(model: TerDiT, y: Tensor, null: int, scale: float, mixed: int) -> Callable[[Tensor, int], Tensor]:
    """The network at labels y as a function of x and a timestep, its first `mixed` noise channels guided."""
    if scale == 1:
        return lambda x, t: model(x, torch.full_like(y, t), y)
    both = torch.cat([y, torch.full_like(y, null)])

    def denoise(x: Tensor, t: int) -> Tensor:
        mix = min(mixed, x.shape[1])
        conditional, unconditional = model(torch.cat([x, x]), torch.full_like(both, t), both).chunk(2)
        eps = unconditional[:, :mix] + scale * (conditional[:, :mix] - unconditional[:, :mix])
        return torch.cat([eps, conditional[:, mix:]], 1)

    return denoise


def _spaced(count: int) -> list[int]:
    """`count` timesteps of 1000, evenly spaced from 0 to 999, as guided-diffusion rounds them."""
    timesteps, position = [], 0.0
    for _ in range(count):
        timesteps.append(round(position))
        position += 999 / max(count - 1, 1)  # summed, not multiplied: where a half is rounded the two can differ
    return timesteps


def _reverse(
    denoise: Callable[[Tensor, int], Tensor], x: Tensor, draw: Callable[[], Tensor], timesteps: list[int], method: str
) -> Tensor:
    """Denoises x (N, C, H, W) to x_0 over ascending timesteps of the linear schedule; coefficients in float64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)[timesteps].tolist()  # the signal's share of the variance
    for i in reversed(range(len(timesteps))):
        here, before = kept[i], kept[i - 1] if i else 1.0
        eps, interpolation = denoise(x, timesteps[i]).chunk(2, 1)
        x_0 = math.sqrt(1 / here) * x - math.sqrt(1 / here - 1) * eps
        if method == "ddim":
            x = math.sqrt(before) * x_0 + math.sqrt(1 - before) * eps
            continue
        beta = 1 - here / before
        x = beta * math.sqrt(before) / (1 - here) * x_0 + (1 - before) * math.sqrt(1 - beta) / (1 - here) * x
        if i:  # the last step adds no noise
            lowest, highest = math.log(beta * (1 - before) / (1 - here)), math.log(beta)
            fraction = (interpolation + 1) / 2
            x = x + torch.exp(0.5 * (fraction * highest + (1 - fraction) * lowest)) * draw()
    return x
