"""TerDiT, Large-DiT, DiT and SiT for PyTorch in one file that imports only torch: networks, loader and samplers.

Copy it wherever it is needed. Training, other samplers and autoencoders are left to others.

    model = load("digits.safetensors", device="cuda")
    images = to_images(sample(model, labels=range(10)), model.description["latent_scale"])

Sources: TerDiT (arXiv 2405.14854), DiT (arXiv 2212.09748), SiT (arXiv 2401.08740), RoFormer (arXiv 2104.09864), DDPM
(arXiv 2006.11239), DDIM (arXiv 2010.02502), learned variances (arXiv 2102.09672), classifier-free guidance (arXiv
2207.12598), shifted noise levels (arXiv 2403.03206).
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
import contextlib
from functools import partial
import hashlib
from itertools import pairwise
import json
import math
import mmap
import operator
import os
from pathlib import Path
import re
from typing import Any
import zipfile
import zlib

import torch
from torch import Tensor, nn
import torch.nn.functional as F

__all__ = ["TerDiT", "load", "sample", "to_images"]

_INTEGERS = ("input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads", "num_kv_heads",
             "ffn_multiple_of", "num_classes")  # fmt: skip
_FLAGS = ("ternary", "qk_norm", "adaln_rms_norm", "learn_sigma")
_OF_TRAINING = ("class_dropout_prob", "alpha_init")  # described, but of no consequence here
_ADDED: dict[str, Any] = {  # what files without these fields are
    "family": "large_dit", "learn_sigma": True, "alpha_per": "matrix", "gamma_per": "matrix", "threshold": 0.5,
}  # fmt: skip
_POSITIONS = {"large_dit": ("rope_1d", "rope_1d_sincos_2d"), "dit": ("sincos_2d",)}  # of each family
_MAX_TOKENS, _MAX_FIELD = 2**16, 2**20  # a description is not to be trusted with our memory
_SD_SCALE = 0.18215  # what published models' latents are multiplied by
_HUB_WEIGHTS = "diffusion_pytorch_model.safetensors"
_DOWNLOAD = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"}
_SHIFTS = (6, 4, 2, 0)  # the first quarter of a weight's rows lies in the highest bits of its planes


class TerDiT(nn.Module):
    """A diffusion transformer: TerDiT or Large-DiT (`family` "large_dit"), DiT or SiT ("dit"), each ternary or not.

    Its parameters and buffers have the names of the published checkpoints, whose state dicts load as they are. A fresh
    one's weights mean nothing. It is for inference: rounding has no gradient, and packed weights cannot move.

    Attributes: `fields`, the architecture; `dtype`; `description`, what the file said of the model (of a DiT or SiT
    without one, what was found), or None.
    """

    frequencies: Tensor
    rope: Tensor
    positions: Tensor
    pos_embed: Tensor
    blocks: nn.ModuleList
    layers: nn.ModuleList

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        packed: bool = True,
        device_map: str | torch.device | None = None,
        subfolder: str | None = None,
        **download: Any,
    ) -> "TerDiT":
        """`load` as diffusers calls it, in `AutoModel.from_pretrained(path, trust_remote_code=True)`.

        Args:
          path: a folder written by `python -m terdit_jax.export --format=hub`, or the name of such a one on the Hub.
          torch_dtype: torch.float32, the default, or torch.bfloat16; `dtype` is the same.
          packed: as for `TerDiT`.
          device_map: one device.
          subfolder: where in the folder the model lies.
          download: cache_dir, force_download, local_files_only, proxies, revision, token: of huggingface_hub.
        """
        if unknown := download.keys() - _DOWNLOAD:
            raise TypeError(f"from_pretrained() has no argument {min(unknown)!r}")
        file = Path(path, subfolder or "", _HUB_WEIGHTS)
        if not file.parent.is_dir():
            from huggingface_hub import hf_hub_download

            given = {name: value for name, value in download.items() if value is not None}
            file = hf_hub_download(str(path), _HUB_WEIGHTS, subfolder=subfolder, **given)
        return load(file, device=device_map or "cpu", dtype=torch_dtype or dtype or torch.float32, packed=packed)

    def __init__(self, fields: Mapping, *, dtype: torch.dtype = torch.bfloat16, packed: bool = True):
        """Args:
          fields: ternary, input_size, in_channels, patch_size, hidden_size, depth, num_heads, num_kv_heads,
            ffn_multiple_of, num_classes, qk_norm, positions ("rope_1d", "rope_1d_sincos_2d"; in DiT "sincos_2d"),
            adaln_rms_norm, and, or they are as published, family, learn_sigma, alpha_per ("matrix" or "channel": what
            shares a scale), and, for master weights, gamma_per (what shares a mean) and threshold.
          dtype: torch.float32 or torch.bfloat16, of the blocks' activations and matmuls. Norms, the condition and the
            output are float32 in both.
          packed: keep the blocks' weights as they are stored (2-bit planes; float32 in full precision) and turn them
            into `dtype` at each use; otherwise do so once, when a state dict is loaded.

        Raises:
          ValueError: fields or a dtype that make no model.
        """
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}: give torch.float32 or torch.bfloat16")
        fields = _ADDED | dict(fields)
        _check_fields(fields)
        self.fields, self.dtype, self.packed = fields, dtype, packed
        self.description: dict | None = None
        channels, patch, width = fields["in_channels"], fields["patch_size"], fields["hidden_size"]
        condition, is_dit = _condition_width(fields), fields["family"] == "dit"
        patches = _RoundedLinear(patch**2 * channels, width, dtype)
        if is_dit:  # a convolution there
            patches.weight = nn.Parameter(patches.weight.detach().unflatten(1, (channels, patch, patch)))
            self.register_buffer("pos_embed", _sincos_2d(fields, torch.get_default_device()))
        self.x_embedder = nn.Sequential(OrderedDict(proj=patches)) if is_dit else patches
        mlp = nn.Sequential(nn.Linear(256, condition), nn.SiLU(), nn.Linear(condition, condition))
        # One row a class, and the last for the null class that guidance subtracts.
        table = nn.Embedding(fields["num_classes"] + 1, condition)
        self.t_embedder, self.y_embedder = nn.ModuleDict({"mlp": mlp}), nn.ModuleDict({"embedding_table": table})
        blocks = nn.ModuleList(_Block(fields, dtype, packed) for _ in range(fields["depth"]))
        setattr(self, "blocks" if is_dit else "layers", blocks)
        head = {
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * width)),
            "linear": _RoundedLinear(width, patch**2 * channels * (1 + fields["learn_sigma"]), dtype),
        }
        self.final_layer = nn.ModuleDict(head)
        self._make_tables(torch.get_default_device())

    @property
    def device(self) -> torch.device:
        return self.frequencies.device

    def get_label_ids(self, label: str | Iterable[str]) -> list[int]:
        """The labels of the classes with these names, as diffusers' DiTPipeline has them.

        A class goes by its name in the description's `class_names` and, as "tench, Tinca tinca", by each part of it
        between commas. Raises ValueError for a name that no class has, or several.
        """
        names, labels = (self.description or {}).get("class_names", []), []
        for one in [label] if isinstance(label, str) else label:
            found = [i for i, name in enumerate(names) if one in (name, *map(str.strip, name.split(",")))]
            if len(found) != 1:
                count = f"classes {found[0]} and {found[1]}" if found else f"no class, of {len(names)} with names"
                raise ValueError(f"{one!r} is the name of {count}")
            labels += found
        return labels

    def draw(self, labels: Iterable[int] | Tensor, *, vae: Any = None, **settings: Any) -> Tensor:
        """Draws an image for each label, all in one batch: `sample`, decoded.

        Args:
          labels: N classes.
          vae: of a model of latents, diffusers' AutoencoderKL that made them, on the model's device.
          settings: of `sample`.

        Returns:
          (N, H, W, 1 or 3) uint8 on the CPU. Raises ValueError as `sample` and `to_images` do.
        """
        x, scale = sample(self, labels, **settings), (self.description or {}).get("latent_scale", _SD_SCALE)
        if vae is not None:
            with torch.no_grad():
                x, scale = vae.decode((x / scale).to(vae.dtype)).sample, 1.0
        return to_images(x, scale).cpu()

    def _make_tables(self, device: torch.device | str) -> None:
        """Fixed tables that no file holds: frequencies of the timestep, angles of RoPE, absolute positions."""
        fields, home = self.fields, _home(device)
        tables = {"frequencies": _falling(128, home)}
        if fields["family"] == "large_dit":
            place = torch.arange((fields["input_size"] // fields["patch_size"]) ** 2, dtype=torch.float64, device=home)
            angles = torch.outer(place, _falling(fields["hidden_size"] // fields["num_heads"] // 2, home))
            tables["rope"] = torch.stack([angles.cos(), angles.sin()])[:, :, None]
        if fields["positions"] == "rope_1d_sincos_2d":
            tables["positions"] = _sincos_2d(fields, device)[0]
        for name, table in tables.items():
            self.register_buffer(name, table.to(device, torch.float32), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predicts the noise in x and the interpolation of the variance, or the velocity of a flow.

        Args:
          x: (B, C, H, W) float noisy latents, or pixels.
          t: (B,) timesteps in [0, 1000); of a flow floats from 0, noise, to 1, data.
          y: (B,) int64 classes; num_classes is the null class.

        Returns:
          (B, 2C, H, W) float32: the noise or velocity, then the interpolation; without `learn_sigma` the first C alone.
        """
        is_dit, patch = self.fields["family"] == "dit", self.fields["patch_size"]
        grid = self.fields["input_size"] // patch
        x = x.unflatten(3, (grid, patch)).unflatten(2, (grid, patch))  # (B, C, g, p, g, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, T, C p p)
        x = self.x_embedder(x)
        if self.fields["positions"] != "rope_1d":
            x = x + (self.pos_embed if is_dit else self.positions)
        x = x.to(self.dtype)
        angles = t.float()[:, None] * self.frequencies
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], 1))
        c = c + self.y_embedder["embedding_table"](y)  # (B, C') float32: every modulation depends on it
        for block in self.blocks if is_dit else self.layers:
            x = block(x, c, None if is_dit else self.rope)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        # Rounded to `dtype`, as the norms of the blocks are, before it is modulated in float32.
        x = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(self.dtype).float() * (1 + scale) + shift
        x = self.final_layer["linear"](x)
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (grid, grid))  # (B, g, g, p, p, C or 2C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


# The two norms and what they feed, by family: each is a module of that name, as published.
_PARTS = {
    "large_dit": ("attention_norm", "attention", "ffn_norm", "feed_forward"),
    "dit": ("norm1", "attn", "norm2", "mlp"),
}


class _Block(nn.Module):
    """Attention and feed-forward, modulated by the condition and gated into the residual stream."""

    def __init__(self, fields: Mapping, dtype: torch.dtype, packed: bool):
        super().__init__()
        width, is_dit = fields["hidden_size"], fields["family"] == "dit"
        linear = partial(_BlockLinear, fields, dtype, packed)
        self.parts = _PARTS[fields["family"]]
        first_norm, attention, second_norm, feed_forward = self.parts
        self.add_module(attention, (_JointAttention if is_dit else _Attention)(fields, linear))
        self.add_module(feed_forward, (_GELU if is_dit else _SwiGLU)(fields, linear))
        for name in (first_norm, second_norm):
            norm = _LayerNorm(width, eps=1e-6, elementwise_affine=False) if is_dit else _RMSNorm(width, eps=1e-5)
            self.add_module(name, norm)
        adaln = [nn.SiLU(), linear(_condition_width(fields), 6 * width, bias=True)]
        if fields["ternary"] and fields["adaln_rms_norm"]:
            adaln.append(_RMSNorm(6 * width, eps=1e-5))
        self.adaLN_modulation = nn.Sequential(*adaln)

    def forward(self, x: Tensor, c: Tensor, rope: Tensor | None) -> Tensor:
        """Maps x (B, T, D) and the condition c (B, C'), float32, to (B, T, D)."""
        first_norm, attention, second_norm, feed_forward = [getattr(self, name) for name in self.parts]
        modulation = self.adaLN_modulation(c).to(x.dtype)[:, None].chunk(6, -1)
        shift, scale, gate = modulation[:3]
        x = x + gate * attention(first_norm(x) * (1 + scale) + shift, rope)
        shift, scale, gate = modulation[3:]
        return x + gate * feed_forward(second_norm(x) * (1 + scale) + shift)


class _SwiGLU(nn.Module):
    def __init__(self, fields: Mapping, linear: Callable[..., nn.Module]):
        super().__init__()
        width, mlp = fields["hidden_size"], _mlp_width(fields)
        self.w1, self.w2, self.w3 = linear(width, mlp), linear(mlp, width), linear(width, mlp)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class _GELU(nn.Module):
    def __init__(self, fields: Mapping, linear: Callable[..., nn.Module]):
        super().__init__()
        width, mlp = fields["hidden_size"], _mlp_width(fields)
        self.fc1, self.fc2 = linear(width, mlp, bias=True), linear(mlp, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x).to(x.dtype), approximate="tanh")).to(x.dtype)


class _Attention(nn.Module):
    """Attention over all tokens; optional norms over the whole of q and k, RoPE over the token's index, grouped kv."""

    def __init__(self, fields: Mapping, linear: Callable[..., nn.Module]):
        super().__init__()
        width, self.head_dim = fields["hidden_size"], fields["hidden_size"] // fields["num_heads"]
        kv_width = fields["num_kv_heads"] * self.head_dim
        self.wq, self.wk, self.wv = linear(width, width), linear(width, kv_width), linear(width, kv_width)
        self.wo = linear(width, width)
        self.q_norm = _LayerNorm(width, eps=1e-5) if fields["qk_norm"] else nn.Identity()
        self.k_norm = _LayerNorm(kv_width, eps=1e-5) if fields["qk_norm"] else nn.Identity()

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Maps x (B, T, D) to (B, T, D); rope is (2, T, 1, head_dim / 2)."""
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (a.unflatten(2, (-1, self.head_dim)) for a in (q, k, v))  # (B, T, heads, head_dim)
        return self.wo(_attend(_rotate(q, rope), _rotate(k, rope), v))


class _JointAttention(nn.Module):
    """DiT's attention: q, k and v are three matrices, one under the other in one tensor, with biases."""

    def __init__(self, fields: Mapping, linear: Callable[..., nn.Module]):
        super().__init__()
        width, self.heads = fields["hidden_size"], fields["num_heads"]
        self.qkv, self.proj = linear(width, 3 * width, bias=True, matrices=3), linear(width, width, bias=True)

    def forward(self, x: Tensor, rope: None) -> Tensor:
        """Maps x (B, T, D) to (B, T, D)."""
        q, k, v = self.qkv(x).to(x.dtype).unflatten(2, (3, self.heads, -1)).unbind(2)
        return self.proj(_attend(q, k, v)).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q (B, T, heads, head_dim) over k and v, which may have fewer heads, to (B, T, D)."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2).flatten(2)


class _BlockLinear(nn.Module):
    """A linear map of a block: weight (out, in), or (out / 4, in) uint8 planes and alphas if ternary: one, or (out,).

    The weight may be several matrices of one size, one under the other, each with scales of its own.
    """

    def __init__(
        self, fields: Mapping, dtype: torch.dtype, packed: bool, width_in: int, width_out: int, bias=False, matrices=1
    ):
        super().__init__()
        self.dtype, self.packed = dtype, packed
        ternary, scales = fields["ternary"], width_out if fields["alpha_per"] == "channel" else matrices
        if ternary and packed:
            self.register_buffer("weight", torch.full((width_out // 4, width_in), 0b01010101, dtype=torch.uint8))
        elif ternary:
            self.register_buffer("weight", torch.zeros(width_out, width_in, dtype=dtype))
        else:
            self.weight = nn.Parameter(torch.zeros(width_out, width_in, dtype=torch.float32 if packed else dtype))
        self.alphas = nn.Parameter(torch.ones(scales)) if ternary else None
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
            scaled = y.float().unflatten(-1, (len(self.alphas), -1)) * self.alphas[:, None]
            y = scaled.flatten(-2).to(self.dtype)
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
        x, weight = (a.to(self.rounded_to).float() for a in (x, self.weight.flatten(1)))
        return F.linear(x, weight, self.bias)


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns interleaved pairs of (B, T, heads, head_dim) in float32: bfloat16 angles would lose whole positions."""
    even, odd = x.float().unflatten(3, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3).to(x.dtype)


def _home(device: torch.device | str) -> str:
    """Where tables are worked out in float64: on the CPU, or nowhere, where unchecked fields cost no memory."""
    return "meta" if torch.device(device).type == "meta" else "cpu"


def _sincos_2d(fields: Mapping, device: torch.device | str) -> Tensor:
    """Absolute positions, (1, T, D) float32: a quarter each of sin and cos of the column, then of the row."""
    grid, home = fields["input_size"] // fields["patch_size"], _home(device)
    place, falling = torch.arange(grid**2, dtype=torch.float64, device=home), _falling(fields["hidden_size"] // 4, home)
    column, row = (torch.outer(axis, falling) for axis in (place % grid, place // grid))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)[None].to(device, torch.float32)


def _falling(count: int, device: str) -> Tensor:
    """Frequencies 1e4^(-i / count), (count,) float64."""
    return 1e4 ** (-torch.arange(count, dtype=torch.float64, device=device) / count)


def _condition_width(fields: Mapping) -> int:
    return fields["hidden_size"] if fields["family"] == "dit" else min(fields["hidden_size"], 1024)


def _mlp_width(fields: Mapping) -> int:
    if fields["family"] == "dit":
        return 4 * fields["hidden_size"]
    multiple = fields["ffn_multiple_of"]
    return math.ceil(int(8 * fields["hidden_size"] / 3) / multiple) * multiple


def _unpacked(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as matmuls read it: planes (out / 4, in) unpacked to (out, in) codes -1, 0 and 1; floats as they are."""
    if weight.dtype != torch.uint8:
        return weight.to(dtype)
    return torch.cat([(weight >> shift & 3).to(dtype) - 1 for shift in _SHIFTS])


def _ternary_planes(weight: Tensor, matrices: int = 1, fields: Mapping = _ADDED) -> Tensor:
    """Master weights (out, in) -> (out / 4, in) planes of clip(round(W / (mean|W| + 1e-6)), -1, 1), half to even.

    The rows may be those of several matrices of one size, each with a mean of its own; or each row has one. Another
    threshold than 0.5 takes rounding's place.
    """
    over, threshold = (1,) if fields["gamma_per"] == "channel" else (0, 1), fields["threshold"]
    parts = [part / (part.abs().mean(over, keepdim=True) + 1e-6) for part in weight.float().chunk(matrices)]
    codes = torch.cat(parts)
    codes = codes.round_().clamp_(-1, 1) if threshold == 0.5 else codes.sign() * (codes.abs() > threshold)
    codes = codes.add_(1).to(torch.uint8)
    planes = [quarter << shift for quarter, shift in zip(codes.chunk(4), _SHIFTS, strict=True)]
    return planes[0] | planes[1] | planes[2] | planes[3]


def _check_fields(fields: Mapping) -> None:
    needed = {*_INTEGERS, *_FLAGS, *_ADDED, "positions"}
    if wrong := sorted(needed ^ (fields.keys() - {*_OF_TRAINING})):
        raise ValueError(f"the model's field {wrong[0]!r} is {'missing' if wrong[0] in needed else 'unknown'}")
    for name in _INTEGERS:
        if type(fields[name]) is not int or not 0 < fields[name] <= _MAX_FIELD:
            raise ValueError(f"the model's field {name}={fields[name]!r}: must be an integer in 1..{_MAX_FIELD}")
    for name in _FLAGS:
        if type(fields[name]) is not bool:
            raise ValueError(f"the model's field {name}={fields[name]!r}: must be true or false")
    if fields["family"] not in (*_POSITIONS,):
        raise ValueError(f"the model's field family={fields['family']!r}: choose one of {', '.join(_POSITIONS)}")
    choices = _POSITIONS[fields["family"]]
    if fields["positions"] not in choices:
        raise ValueError(f"the model's field positions={fields['positions']!r}: choose one of {', '.join(choices)}")
    for name in ("alpha_per", "gamma_per"):
        if fields[name] not in ("matrix", "channel"):
            raise ValueError(f"the model's field {name}={fields[name]!r}: choose one of matrix, channel")
    if type(fields["threshold"]) not in (int, float) or not 1e-3 <= fields["threshold"] < 1:
        raise ValueError(f"the model's field threshold={fields['threshold']!r}: must lie in [0.001, 1)")
    size, patch, width = fields["input_size"], fields["patch_size"], fields["hidden_size"]
    heads, kv_heads, is_dit = fields["num_heads"], fields["num_kv_heads"], fields["family"] == "dit"
    if is_dit and (fields["qk_norm"] or heads != kv_heads):
        raise ValueError("the family 'dit' has no qk_norm, and as many num_kv_heads as num_heads")
    if size % patch or (size // patch) ** 2 > _MAX_TOKENS:
        raise ValueError(f"patches of {patch} do not cut {size} x {size} into at most {_MAX_TOKENS} tokens")
    if width % (heads if is_dit else 2 * heads) or width % 4 or heads % kv_heads:
        raise ValueError(f"hidden_size={width}, num_heads={heads}, num_kv_heads={kv_heads} do not divide into heads")
    if fields["ternary"] and (_mlp_width(fields) % 4 or width // heads * kv_heads % 4):
        raise ValueError("the widths of k, v and the feed-forward must be multiples of 4 to be packed")


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    packed: bool = True,
    num_heads: int | None = None,
    objective: str | None = None,
) -> TerDiT:
    """Reads a model, checking every byte that has a checksum and every name, shape and value.

    Args:
      path: an artifact (.safetensors); a plain safetensors export with its description; a folder for the Hugging Face
        Hub, which holds one of the two; a PyTorch export or published
        checkpoint, as a directory or as one .pth file beside its model_args.pth; a published checkpoint of DiT or SiT,
        or of their training, as one .pt file. Averaged weights come before the others, and in a directory ternary
        files before full precision. Nothing in a file is ever run.
      device: where the model goes.
      dtype: as for `TerDiT`.
      packed: as for `TerDiT`. Then `state_dict()` is, bit for bit, the float32 and uint8 tensors of the file. Float
        weights of a ternary map are master weights: they are ternarised by the absmean rule in either mode.
      num_heads: of attention, for a DiT or SiT of no published size, whose file does not tell.
      objective: "ddpm" or "flow", for one whose file is not named as published: those of DiT and SiT are alike.

    Returns:
      The model in eval mode, without gradients.

    Raises:
      ValueError: a file of another kind, damaged, or that does not fit its description, or an argument that is missing
        or that the file contradicts; one line.
      OSError: a path that cannot be read.
    """
    path = Path(os.path.expanduser(path))
    if (path / _HUB_WEIGHTS).exists():
        path /= _HUB_WEIGHTS
    try:
        tensors, fields, description = _read(path, num_heads, objective)
        depth = _depth(tensors)
        if depth != fields.get("depth"):  # before anything is built by the description alone
            raise ValueError(f"has {depth} layers, its description says {fields.get('depth')}")
        with torch.device("meta"):
            model, published = TerDiT(fields, dtype=dtype, packed=packed), TerDiT(fields).state_dict()
        fitting = _fitting(tensors, published, device, model.fields)
        if "pos_embed" in published and not _is_table(tensors["pos_embed"], model.fields):
            raise ValueError("tensor 'pos_embed' is not the fixed table of 2-D positions that this model has")
        model.load_state_dict(fitting, assign=True)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    model._make_tables(device)
    model.description = description
    return model.requires_grad_(False).eval()


def _depth(tensors: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(("layers.", "blocks."))})


def _is_table(tensor: Tensor, fields: Mapping) -> bool:
    table = _sincos_2d(fields, "cpu").to(tensor.dtype)  # as files in half precision have it
    return torch.allclose(tensor.float(), table.float(), rtol=0, atol=1e-6)


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST = 2.0**40  # of parameters: squares of what larger ones make overflow float32 in the norms
_DTYPES = _FLOATS | {"U8": torch.uint8}


def _fitting(
    tensors: Mapping[str, Tensor], published: Mapping[str, Tensor], device: str | torch.device, fields: Mapping
) -> dict:
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
        if ternary and not planes:
            tensor = _ternary_planes(tensor, 3 if name.endswith(".attn.qkv.weight") else 1, fields)
        tensor = tensor.detach()
        fitting[name] = tensor.to(device, target.dtype, copy=True)  # never a view of the mapped file
    return fitting


_Contents = tuple[dict[str, Tensor], dict, dict | None]  # tensors, fields, description


def _read(path: Path, num_heads: int | None = None, objective: str | None = None) -> _Contents:
    """Reads any kind of file; a published TerDiT or Large-DiT has no description."""
    try:
        contents = _read_torch(path, num_heads, objective) if _is_torch(path) else _read_safetensors(path)
        _, fields, description = contents
        diffusion = (description or {}).get("diffusion", {})
        said = {"num_heads": fields.get("num_heads"), "objective": diffusion.get("objective", "ddpm")}
        for name, given in (("num_heads", num_heads), ("objective", objective)):
            if given not in (None, said[name]):
                raise ValueError(f"has {name}={said[name]}, but {name}={given} was given: leave it out")
        return contents
    except (LookupError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its header or description is malformed: {type(error).__name__} {error}") from error


def _is_torch(path: Path) -> bool:
    if path.is_dir():
        return True
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04" or path.suffix in (".pt", ".pth")  # before version 1.6 they were no zips


def _read_safetensors(path: Path) -> _Contents:
    """An artifact, which is verified, or a plain export, which has no checksums."""
    with open(path, "rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
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
# Of DiT and SiT: heads by layers and width (S, B, L, XL), how files are named, and what each learned to predict.
_DIT_HEADS = {(12, 384): 6, (12, 768): 12, (24, 1024): 16, (28, 1152): 16}
_DIT_NAME = re.compile(r"(DiT|SiT)-(S|B|L|XL)-[248](?!\d)")
_OBJECTIVES = {"DiT": "ddpm", "SiT": "flow"}


def _read_torch(path: Path, num_heads: int | None, objective: str | None) -> _Contents:
    """An export or a published checkpoint: a state dict, but for DiT's and SiT's with a model_args.pth beside it."""
    files = [path / f"{stem}.00-of-01.pth" for stem in _PREFERENCE] if path.is_dir() else [path]
    weights = next((file for file in files if file.exists()), None)
    if weights is None:
        raise ValueError(f"holds none of {', '.join(file.name for file in files)}")
    beside, tensors = weights.with_name("model_args.pth"), _state_dict(weights)
    args = _torch_load(beside) if weights.suffix != ".pt" and beside.exists() else None
    if args is not None and not isinstance(args, argparse.Namespace):
        raise ValueError(f"model_args.pth holds a {type(args).__name__}, not an argparse.Namespace")
    description = getattr(args, "terdit_jax", None)
    if description is not None:
        return tensors, dict(description["model"]), description
    if "x_embedder.proj.weight" in tensors:
        return _describe_dit(weights, tensors, num_heads, objective)
    if args is None and weights.suffix == ".pt":
        raise ValueError("holds no state dict of DiT or SiT: it lacks tensor 'x_embedder.proj.weight'")
    if args is None:
        raise ValueError("there is no model_args.pth beside the weights")
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


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a bare state dict, or those that a checkpoint of training holds, averaged if it has them."""
    tensors = _torch_load(path)
    if isinstance(tensors, dict):
        tensors = next((tensors[name] for name in ("ema", "model") if name in tensors), tensors)
    if not isinstance(tensors, dict) or not all(_is_plain(*item) for item in tensors.items()):
        raise ValueError(f"{path.name} is no state dict")
    if sum(tensor.nbytes for tensor in tensors.values()) > path.stat().st_size:
        raise ValueError(f"{path.name} holds tensors that share numbers, and together are larger than the file")
    return tensors


def _describe_dit(path: Path, tensors: dict[str, Tensor], num_heads: int | None, objective: str | None) -> _Contents:
    """A checkpoint of DiT or SiT: the shapes of its tensors and its name say what it is, or else the caller."""
    for name, axes in (("x_embedder.proj.weight", 4), ("pos_embed", 3), ("final_layer.linear.weight", 2),
                       ("y_embedder.embedding_table.weight", 2)):  # fmt: skip
        if name not in tensors or tensors[name].ndim != axes:
            raise ValueError(f"not a checkpoint of DiT or SiT: it has no tensor {name!r} of {axes} axes")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    depth, learn_sigma = _depth(tensors), len(tensors["final_layer.linear.weight"]) > patch**2 * channels
    if named := _DIT_NAME.match(path.name):
        objective = _OBJECTIVES[named[1]]
    if objective not in _OBJECTIVES.values():
        raise ValueError(f"objective is {objective!r}, and the name begins as neither DiT-XL-2 nor SiT-XL-2: give ddpm "
                         "for DiT, or flow for SiT")  # fmt: skip
    if objective == "ddpm" and not learn_sigma:
        raise ValueError("a DiT has output channels for the variance, and this has none: is it a SiT?")
    heads = _DIT_HEADS.get((depth, width), num_heads)
    if heads is None:
        raise ValueError(f"width {width} with {depth} layers is no size of the published DiT and SiT: give num_heads")
    fields = {
        "family": "dit", "ternary": "blocks.0.attn.qkv.alphas" in tensors, "in_channels": channels, "patch_size": patch,
        "input_size": math.isqrt(tensors["pos_embed"].shape[1]) * patch, "hidden_size": width, "depth": depth,
        "num_heads": heads, "num_kv_heads": heads, "ffn_multiple_of": 256, "qk_norm": False, "positions": "sincos_2d",
        "num_classes": len(tensors["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": learn_sigma, "adaln_rms_norm": "blocks.0.adaLN_modulation.2.weight" in tensors,
    }  # fmt: skip
    codec, scale = ("sd-vae-ft-ema", _SD_SCALE) if channels == 4 else ("none", 1.0)
    about = {"name": path.stem, "model": fields, "codec": codec, "latent_scale": scale}
    return tensors, fields, about | {"diffusion": {"objective": objective}}


def _is_plain(name: object, tensor: object) -> bool:
    if not (isinstance(name, str) and isinstance(tensor, Tensor)):
        return False
    return tensor.layout == torch.strided and tensor.device.type == "cpu"


def _torch_load(path: Path) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
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
_SAMPLE: dict[str, Any] = {"num_steps": 250, "cfg_scale": 4.0, "cfg_channels": 3}  # the published demo's
_METHODS = {"ddpm": ("ddpm", "ddim"), "flow": ("sde", "euler", "heun")}  # of each objective, its default first
_FLOW = {"path": "linear", "shift": 1.0}
_PATHS = ("linear", "gvp")
_LAST_STEP = 0.04  # of "sde", in t: without noise, as SiT's


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
      num_steps: 1 to 1000; of a DDPM model, how many of its 1000 steps to take.
      cfg_scale: eps_null + cfg_scale * (eps_label - eps_null); 1 is no guidance and halves the work.
      cfg_channels: min(cfg_channels, C) channels of the noise, or velocity, are guided; 0: all.
      method: of a DDPM model "ddpm", ancestral sampling with the learned variance, or "ddim", which is deterministic.
        Of a flow "sde", which adds noise; "euler"; "heun", of second order at two calls of the network a step.
      first: the number of the first image, to draw a large set in several calls.

    Settings left out come from the description, or else 250 steps of ddpm or sde, guided by 4.0 on 3 channels. A flow's
    path and shift come from it too, or else "linear" and 1.

    Returns:
      (N, C, H, W) float32 on the model's device: latents, or the pixels of a pixel-space model.

    Raises:
      ValueError: labels or settings that cannot be, or a method of another objective than the model's.
    """
    described: dict[str, Any] = model.description or {}
    diffusion: dict[str, Any] = {"objective": "ddpm"} | _FLOW | described.get("diffusion", {})
    objective, path, shift = (diffusion[name] for name in ("objective", *_FLOW))
    if objective not in (*_METHODS,) or path not in _PATHS:
        raise ValueError(f"the model's objective is {objective!r} on the path {path!r}: a newer version may be needed")
    if type(shift) not in (int, float) or not 0 < shift < math.inf:
        raise ValueError(f"the model's shift is {shift!r}: it must be positive")
    if objective == "ddpm" and not model.fields["learn_sigma"]:
        raise ValueError("the model has no learned variance, which sampling by ddpm and ddim needs here")
    methods = _METHODS[objective]
    settings: dict[str, Any] = {"method": methods[0]} | _SAMPLE | described.get("sample", {})
    given = {"method": method, "num_steps": num_steps, "cfg_scale": cfg_scale, "cfg_channels": cfg_channels}
    settings |= {name: value for name, value in given.items() if value is not None}
    method, num_steps, scale, mixed = (settings[name] for name in ("method", *_SAMPLE))
    if method not in methods:
        raise ValueError(f"method is {method!r}: a {objective} model takes one of {', '.join(methods)}")
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

    last = settings.get("cfg_t_max", 1000)
    interval = settings.get("cfg_t_min", 0), math.inf if last == 1000 else last
    denoise = _guided(model, y, null, scale, mixed or channels, interval)
    if objective == "flow":
        return _follow(denoise, draw(), draw, path, _flow_times(method, num_steps, shift), method)
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


def _guided(
    model: TerDiT, y: Tensor, null: int, scale: float, mixed: int, interval: tuple[float, float] = (0, math.inf)
) -> Callable[[Tensor, float], Tensor]:
    """The network at labels y as a function of x and t, the first `mixed` channels of noise or velocity guided where
    the timestep, of a flow 1000 (1 - t), lies in the interval."""
    flow = (model.description or {}).get("diffusion", {}).get("objective") == "flow"
    both = torch.cat([y, torch.full_like(y, null)])

    def denoise(x: Tensor, t: float) -> Tensor:
        timestep = round(1024000 * (1 - t)) / 1024 if flow else t
        if scale == 1 or not interval[0] <= timestep < interval[1]:
            return model(x, x.new_full((len(y),), t), y)
        mix = min(mixed, x.shape[1])
        conditional, unconditional = model(torch.cat([x, x]), x.new_full((len(both),), t), both).chunk(2)
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


def _flow_times(method: str, count: int, shift: float) -> list[float]:
    """The t at which `count` steps begin, and 1, where the last ends, with noise levels u moved to
    shift u / (1 + (shift - 1) u)."""
    steps = max(count - 1, 1) if method == "sde" else count
    moved = [t / (t + shift * (1 - t)) for t in (i / steps for i in range(count))]
    # Those of "sde" end at 1 - _LAST_STEP, and one of that size follows.
    return [(1 - _LAST_STEP) * t if method == "sde" else t for t in moved] + [1.0]


def _follow(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    draw: Callable[[], Tensor],
    path: str,
    times: list[float],
    method: str,
) -> Tensor:
    """Follows the velocity, the first C channels of `denoise`, from noise x (N, C, H, W) at the first time to data.

    "sde" takes Euler-Maruyama steps of dx = (v + sigma score) dt + sqrt(2 sigma) dw.
    """
    channels = x.shape[1]
    for t, after in pairwise(times):
        dt, v = after - t, denoise(x, t)[:, :channels]
        if method == "heun":
            v = (v + denoise(x + dt * v, after)[:, :channels]) / 2
        if method != "sde":
            x = x + dt * v
            continue
        alpha, sigma, d_alpha, d_sigma = _path_at(path, t)
        noise = (d_alpha * x - alpha * v) / (sigma * d_alpha - alpha * d_sigma)
        x = x + dt * (v - noise)  # sigma times the score is the noise, negative
        if after < 1:  # the last step adds no noise
            x = x + math.sqrt(2 * sigma * dt) * draw()
    return x


def _path_at(path: str, t: float) -> tuple[float, float, float, float]:
    """The weights of data and noise in x_t = alpha x_0 + sigma noise, and their derivatives by t."""
    if path == "linear":
        return t, 1 - t, 1.0, -1.0
    angle = math.pi / 2 * t
    sin, cos = math.sin(angle), math.cos(angle)
    return sin, cos, math.pi / 2 * cos, -math.pi / 2 * sin
