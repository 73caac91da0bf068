"""One training step in PyTorch as a user might write it instead: what `benchmarks.training` is set beside. Prints JSON.

python -m benchmarks.torch_training --one=configs/terdit_600m.py:64:ternary

ternary: quantisation-aware training of the configuration's network, weights ternarised in every forward pass, the
gradient straight through. full: the same network in full precision. Both: float32 parameters, bfloat16 matmuls and
attention, network and loss under torch.compile, fused AdamW, global-norm clip and EMA over lists of tensors. The loss
is the squared error and the Gaussian part of the variational bound.
"""

from collections.abc import Sequence
import json
import time

from absl import flags
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from benchmarks.torch_inference import FIELDS, FullLinear, block_linears
from terdit_jax.config import freeze
from terdit_jax.config_file import load_config
from terdit_jax.diffusion.schedule import linear_schedule
from terdit_jax.errors import UserError, run_command
from terdit_jax.interop.pytorch import TerDiT
from terdit_jax.model.config import DiTConfig

_ONE = flags.DEFINE_string("one", None, "config:batch:peer, with a peer of ternary and full.")
_STEPS = flags.DEFINE_integer("steps", 20, "Timed steps, after warm-up.", lower_bound=1)
_WARM_UP = flags.DEFINE_integer("warm_up", 3, "Steps before them, the first of which compiles.", lower_bound=1)
_DEVICE = flags.DEFINE_string("device", "cuda", "Where it runs.")

PEERS = ("ternary", "full")
CLIP_NORM, EMA_DECAY = 2.0, 0.9999


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    if not _ONE.value or _ONE.value.count(":") != 2:
        raise UserError(f"--one={_ONE.value}: give config:batch:peer, such as configs/terdit_600m.py:64:ternary")
    path, batch_size, peer = _ONE.value.split(":")
    if peer not in PEERS:
        raise UserError(f"--one={_ONE.value}: no peer {peer!r}, choose one of {', '.join(PEERS)}")
    config = freeze(load_config(path))
    model = DiTConfig.from_config(config)
    row = {"config": config.name, "peer": peer, "batch_size": int(batch_size), "devices": 1}
    print(json.dumps(row | measure(model, peer, int(batch_size), _DEVICE.value)))


class QuantisedLinear(nn.Module):
    """y = alpha x T^T + b, with T the weight ternarised by its mean magnitude and the gradient straight through."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.alpha = nn.Parameter(torch.full((1,), 0.02))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in bfloat16."""
        gamma = self.weight.abs().mean()
        codes = (self.weight / (gamma + 1e-6)).round().clamp(-1, 1)
        codes = self.weight + (codes - self.weight).detach()
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return F.linear(x.to(torch.bfloat16), (self.alpha * codes).to(torch.bfloat16), bias)


def make_network(model: DiTConfig, peer: str, device: str) -> nn.Module:
    """With random weights, none of them zero."""
    fields = {name: getattr(model, name) for name in FIELDS}
    with torch.device(device):
        # "Packed" Large-DiT keeps float32 weights and rounds them at each use.
        network = TerDiT(fields | {"ternary": False}, dtype=torch.bfloat16, packed=True)
        for path, owner, name, layer in block_linears(network):
            if peer == "ternary":
                setattr(owner, name, QuantisedLinear(layer))
                if "adaLN" in path and model.adaln_rms_norm:
                    owner.append(nn.RMSNorm(6 * model.hidden_size, eps=1e-5))
            elif "adaLN" not in path:
                setattr(owner, name, FullLinear(layer))
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for tensor in network.parameters():
            if tensor.ndim > 1:
                tensor.normal_(0, 0.02, generator=generator)
    return network


class Loss(nn.Module):
    """Squared error of the noise, and the bound's divergence between the true and the predicted reverse step."""

    def __init__(self, network: nn.Module, device: str):
        super().__init__()
        self.network = network
        schedule = linear_schedule()
        for name in (
            "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2",
            "posterior_log_variance_clipped", "betas",
        ):  # fmt: skip
            table = torch.tensor(getattr(schedule, name), dtype=torch.float32, device=device)
            self.register_buffer(name, table[:, None, None, None])

    def forward(self, x_0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """x_0, noise (B, C, H, W), t, y (B,) -> () float32."""
        signal, spread = self.sqrt_alphas_cumprod[t], self.sqrt_one_minus_alphas_cumprod[t]
        x_t = signal * x_0 + spread * noise
        eps, v = self.network(x_t, t, y).chunk(2, 1)
        low, high = self.posterior_log_variance_clipped[t], self.betas[t].log()
        log_variance = low + (v + 1) / 2 * (high - low)
        guess = (x_t - spread * eps.detach()) / signal
        difference = self.posterior_mean_coef1[t] * (x_0 - guess)
        divergence = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + difference**2 / log_variance.exp())
        return F.mse_loss(eps, noise) + divergence.mean() / 0.6931471805599453


def measure(model: DiTConfig, peer: str, batch_size: int, device: str) -> dict:
    """Images a second and memory of the whole step."""
    network = make_network(model, peer, device)
    params = list(network.parameters())
    ema = [tensor.detach().clone() for tensor in params]
    optimizer = torch.optim.AdamW(params, lr=5e-4, weight_decay=0.0, fused=True)
    loss_of = torch.compile(Loss(network, device), dynamic=False)
    height, width, channels = model.sample_shape
    generator = torch.Generator(device).manual_seed(1)
    x_0 = torch.randn(batch_size, channels, height, width, device=device, generator=generator)
    labels = torch.randint(model.num_classes, (batch_size,), device=device, generator=generator)

    def step() -> Tensor:
        t = torch.randint(1000, (batch_size,), device=device, generator=generator)
        loss = loss_of(x_0, t, labels, torch.randn(x_0.shape, device=device, generator=generator))
        loss.backward()
        nn.utils.clip_grad_norm_(params, CLIP_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(ema, params, 1 - EMA_DECAY)
        return loss.detach()

    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    begin = time.perf_counter()
    step()
    synchronize()
    compile_seconds = time.perf_counter() - begin
    for _ in range(_WARM_UP.value - 1):
        step()
    synchronize()
    begin = time.perf_counter()
    for _ in range(_STEPS.value):
        loss = step()
    synchronize()
    seconds = time.perf_counter() - begin
    return {
        "images_per_second": _STEPS.value * batch_size / seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "compile_seconds": compile_seconds,
        "last_loss": float(loss),
    }


if __name__ == "__main__":
    run_command(main)
