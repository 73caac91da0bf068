"""The encoder of `terdit_jax.model.vae` in plain PyTorch, written for speed: what `benchmarks.vae` sets ours beside.

It owns the network and how its weights come from ours; the benchmark times it.
"""

import numpy as np
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from terdit_jax.model.vae import MAX_LOGVAR, MIN_LOGVAR, VAEConfig

EPSILON = 1e-6


class Resnet(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around a shortcut."""

    def __init__(self, before: int, width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, EPSILON)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, EPSILON)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, width, 1) if before != width else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over pixels, one head."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, T, C)
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](mixed).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """A convolution of stride two, padded at the bottom and the right."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Encoder(nn.Module):
    """(B, in_channels, H, W) to mean and standard deviation, (B, latent_channels, H / 8, W / 8) float32."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, moments = config.block_out_channels, config.norm_num_groups, 2 * config.latent_channels
        self.encoder = nn.Module()
        self.encoder.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.encoder.down_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            stage = nn.Module()
            layers = range(config.layers_per_block)
            stage.resnets = nn.ModuleList([Resnet(width if j else before, width, groups) for j in layers])
            stage.downsamplers = nn.ModuleList([Downsample(width)] if i < len(widths) - 1 else [])
            self.encoder.down_blocks.append(stage)
        self.encoder.mid_block = nn.Module()
        self.encoder.mid_block.resnets = nn.ModuleList([Resnet(widths[-1], widths[-1], groups) for _ in range(2)])
        self.encoder.mid_block.attentions = nn.ModuleList([Attention(widths[-1], groups)])
        self.encoder.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPSILON)
        self.encoder.conv_out = nn.Conv2d(widths[-1], moments, 3, padding=1)
        self.quant_conv = nn.Conv2d(moments, moments, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        encoder, middle = self.encoder, self.encoder.mid_block
        x = encoder.conv_in(x.to(encoder.conv_in.weight.dtype))
        for stage in encoder.down_blocks:
            for layer in (*stage.resnets, *stage.downsamplers):
                x = layer(x)
        x = middle.resnets[1](middle.attentions[0](middle.resnets[0](x)))
        x = encoder.conv_out(F.silu(encoder.conv_norm_out(x)))
        mean, logvar = self.quant_conv(x).float().chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(MIN_LOGVAR, MAX_LOGVAR))


def make_encoder(config: VAEConfig, params: dict, dtype: torch.dtype, device: str) -> Encoder:
    """The encoder with our parameters (see `terdit_jax.model.vae.abstract_params`), channels last."""

    def flatten(tree: dict, prefix: str = "") -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                tensors |= flatten(value, f"{prefix}{name}.")
            else:
                array = np.asarray(value)
                tensors[prefix + name] = torch.tensor(np.moveaxis(array, -1, 1) if array.ndim == 4 else array)
        return tensors

    encoder = Encoder(config)
    encoder.load_state_dict(flatten({name: params[name] for name in ("encoder", "quant_conv")}))
    return encoder.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)


def to_torch(pictures: np.ndarray, device: str) -> Tensor:
    """(B, H, W, C) to (B, C, H, W), the memory as it was."""
    return torch.tensor(pictures).to(device).permute(0, 3, 1, 2)
