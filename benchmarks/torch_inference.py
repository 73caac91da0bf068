"""One guided denoising step in PyTorch, in each way that a user might pick instead: what `benchmarks.inference` is set
beside. Prints a line of JSON for each row.

python -m benchmarks.torch_inference --configs=configs/terdit_600m.py --batches=1,32 --peers=compiled,public

compiled: Large-DiT in bfloat16 under torch.compile, with fused attention. compiled_fp8: the same with the blocks'
matmuls in fp8, weights resident in it, a scale a token. public: what TerDiT's published code does, packed weights
unpacked to float32 in every layer and multiplied in TF32, not compiled. Compilation happens before the lock is taken.
"""

from collections.abc import Callable, Sequence
import json
import time

from absl import flags
import numpy as np
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from benchmarks.machine import locked, parse_run
from terdit_jax.errors import run_command
from terdit_jax.interop.pytorch import TerDiT
from terdit_jax.model.config import DiTConfig
from terdit_jax.paths import define_path

_CONFIGS = flags.DEFINE_list("configs", None, "Of models, as benchmarks.machine.parse_run reads them.")
_BATCHES = flags.DEFINE_list("batches", "1,32", "Pictures drawn at once.")
_PEERS = flags.DEFINE_list("peers", "compiled,compiled_fp8,public", "Which ways.")
_UNTIL = flags.DEFINE_float("until", float("inf"), "Seconds since 1970 after which no row is begun.")
_LOCK = define_path("lock", None, "File that is locked while the device is timed.")
_SECONDS = flags.DEFINE_float("seconds", 0.4, "Length of one run of steps, of which there are five.")

FIELDS = ("family", "learn_sigma", "input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads",
          "num_kv_heads", "ffn_multiple_of", "num_classes", "qk_norm", "positions", "adaln_rms_norm")  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    torch.set_float32_matmul_precision("high")
    for text in _CONFIGS.value:
        config, batches = parse_run(text)
        model = DiTConfig.from_config(config)
        for peer in _PEERS.value:
            network = make_peer(peer, {name: getattr(model, name) for name in FIELDS})
            for batch in batches or map(int, _BATCHES.value):
                if time.time() > _UNTIL.value:
                    return
                row = {"who": f"torch {peer}", "model": config.name, "pixels": 8 * model.input_size, "batch": batch}
                try:
                    row |= measure(network, model.sample_shape, model.num_classes, batch)
                except Exception as error:  # one that fails leaves the others to be measured
                    row |= {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
                print("row " + json.dumps(row), flush=True)
            del network
            torch.cuda.empty_cache()
            torch._dynamo.reset()


def make_peer(peer: str, fields: dict) -> nn.Module:
    """The network on the device, with random weights."""
    public = peer == "public"
    dtype = torch.float32 if public else torch.bfloat16
    with torch.device("cuda"):
        network = TerDiT(fields | {"ternary": public}, dtype=dtype, packed=public)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.normal_(0, 0.02, generator=generator)
    if not public:
        for path, owner, name, layer in block_linears(network):
            if peer == "compiled_fp8" and "adaLN" not in path:
                setattr(owner, name, Fp8Linear(layer))
            elif "adaLN" not in path:
                setattr(owner, name, FullLinear(layer))
    return network if public else torch.compile(network, dynamic=False)


def block_linears(network: nn.Module) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """The linear maps of the blocks: path, the module that holds each, its name there, the map."""
    found = []
    for path, layer in network.named_modules():
        if type(layer).__name__ == "_BlockLinear":
            owner, _, name = path.rpartition(".")
            found.append((path, network.get_submodule(owner), name, layer))
    return found


class FullLinear(nn.Module):
    """A linear map in bfloat16, whose bias the matmul adds."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return F.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16), bias)


class Fp8Linear(nn.Module):
    """A linear map with both operands in e4m3, activations scaled a token."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        weight = layer.weight.detach()  # no graph is kept, and with it no weight in float32
        self.bias = None if layer.bias is None else layer.bias.detach().to(torch.bfloat16)
        self.scale = (weight.abs().amax(1, keepdim=True).float() / 448).T.contiguous()  # (1, out)
        self.weight = (weight.float() / self.scale.T).to(torch.float8_e4m3fn)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 448
        rows = (rows.float() / scale).to(torch.float8_e4m3fn)
        kind = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        y = torch._scaled_mm(rows, self.weight.T, scale, self.scale, self.bias, **kind)
        return y.unflatten(0, x.shape[:-1])


def measure(network: nn.Module, shape: tuple[int, int, int], num_classes: int, batch: int) -> dict:
    """Milliseconds a guided step, and memory."""
    height, width, channels = shape
    x = torch.randn(batch, channels, height, width, device="cuda")
    labels = torch.arange(batch, device="cuda") % num_classes
    y = torch.cat([labels, torch.full_like(labels, num_classes)])
    t = torch.full((2 * batch,), 500, device="cuda")
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    def step(x: Tensor) -> Tensor:
        both = network(torch.cat([x, x]), t, y)[:, :channels]
        conditional, unconditional = both.chunk(2)
        eps = unconditional[:, :3] + 4.0 * (conditional[:, :3] - unconditional[:, :3])
        return x - 0.01 * torch.cat([eps, conditional[:, 3:]], 1)

    begin = time.perf_counter()
    with torch.inference_mode():
        for _ in range(3):
            step(x)
        torch.cuda.synchronize()
        compile_seconds = time.perf_counter() - begin
        with locked(_LOCK.value):
            milliseconds = time_steps(step, x, _SECONDS.value)
    return {
        "ms": milliseconds,
        "held_gb": held / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "compile_seconds": compile_seconds,
    }


def time_steps(step: Callable[[Tensor], Tensor], x: Tensor, seconds: float) -> float:
    """Median over five runs of about `seconds` each."""

    def run(count: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            step(x)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin) / count

    count = max(2, int(1e3 * seconds / run(2)))
    return float(np.median([run(count) for _ in range(5)]))


if __name__ == "__main__":
    run_command(main)
