"""The modes of inference: the dtypes of weights and matmuls, by one word; each equals `model.transformer.forward`.

`inference_pass` computes in them; docs/deployment.md has each one's speed, memory and error.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from terdit_jax.choices import MODES
from terdit_jax.errors import UserError
from terdit_jax.fast.hopper import warpgroup
from terdit_jax.fast.plan import choose_attention
from terdit_jax.model.attention import Implementation
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import count_params
from terdit_jax.parallel.compiler_options import LAYER_BY_LAYER, WITHOUT_TRITON, Options

_RESERVED = 0.25  # of a device's memory, for activations and the compiler


@dataclasses.dataclass(frozen=True)
class Numerics:
    """weights: dtype in which codes stay in memory, or "packed". matmul_dtype: of both factors of a matmul.
    product_dtype: of its result, summed in float32 or int32. kernels: whether Hopper's kernels run between matmuls.
    attention: implementation of `jax.nn.dot_product_attention`, or "cpu", `cpu_attention`."""

    weights: str
    matmul_dtype: str
    product_dtype: str
    kernels: bool = False
    attention: Implementation | Literal["cpu"] = "xla"


def choose_numerics(mode: str, config: DiTConfig, mesh: Mesh) -> Numerics | None:
    """The dtypes of a mode on the mesh's devices, or None for the forward pass of training over packed codes.

    That one is what `auto` takes wherever the matrices are cut over the mesh, and on CPUs in float32, where it equals
    quantisation-aware training bit for bit; in bfloat16, packed weights, whose unpacking costs next to nothing there.

    Args:
      mode: of MODES.
      config: architecture and activation dtype.
      mesh: the devices.

    Raises:
      UserError: a mode that there is not, or that the model or the mesh cannot have.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r}: choose one of {', '.join(MODES)}")
    device = mesh.devices.flat[0]
    cut = [f"{axis}={size}" for axis, size in mesh.shape.items() if axis != "data" and size > 1]
    if mode == "plain":
        return None
    if mode == "auto":
        if cut or device.platform == "cpu" and config.dtype == "float32":
            return None
        roomy = device.platform != "cpu" and _fits(config, device)
        mode = "exact" if not config.ternary or roomy else "small_exact"
    if not config.ternary and mode != "exact":
        raise UserError(f"mode {mode}: is of ternary models, and this one is full precision; give auto or exact")
    if cut:
        raise UserError(f"mode {mode}: needs whole matrices on each device, mesh {', '.join(cut)} cuts them; give auto")
    eight = _eight_bit_dtype(device)
    matmul_dtype = eight if mode in ("fast", "small") else config.dtype
    if device.platform == "cpu" and matmul_dtype == config.dtype:
        # A bfloat16 product, too, leaves in float32: XLA has instructions of the CPU for no other.
        weights = "packed" if mode == "small_exact" else matmul_dtype
        return Numerics(weights, matmul_dtype, product_dtype="float32", attention="cpu")
    return Numerics(
        weights="packed" if mode.startswith("small") else matmul_dtype,
        matmul_dtype=matmul_dtype,
        product_dtype="int32" if matmul_dtype == "int8" else config.dtype,
        kernels=_has_kernels(config, device) and matmul_dtype != "int8",
        attention=choose_attention(config, device),
    )


def compiler_options(numerics: Numerics | None) -> Options | None:
    """For `jax.jit` of what computes in these numbers: in 8 bits, where Triton costs most, GPUs do without it; CPUs
    would otherwise unpack all layers before they run the first."""
    if numerics and numerics.attention == "cpu":
        return LAYER_BY_LAYER
    if numerics is None or jax.default_backend() != "gpu" or jnp.dtype(numerics.matmul_dtype).itemsize > 1:
        return None
    return WITHOUT_TRITON


def _fits(config: DiTConfig, device: jax.Device) -> bool:
    held = count_params(config)["total"] * config.activation_dtype.itemsize
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit is None or held < (1 - _RESERVED) * limit


def _eight_bit_dtype(device: jax.Device) -> str:
    """fp8 where matmuls take it (Ada, Hopper and later, and CPUs, which only imitate it), int8 elsewhere."""
    if device.platform == "gpu":
        return "float8_e4m3fn" if _compute_capability(device) >= (8, 9) else "int8"
    return "float8_e4m3fn" if device.platform == "cpu" else "int8"


def _has_kernels(config: DiTConfig, device: jax.Device) -> bool:
    if not warpgroup.run_on(device) or config.activation_dtype != jnp.bfloat16:
        return False
    return warpgroup.supports(config.hidden_size, config.kv_width, config.mlp_width, pairs=config.traits.rope)


def _compute_capability(device: jax.Device) -> tuple[int, ...]:
    return tuple(int(part) for part in str(getattr(device, "compute_capability", "0.0")).split("."))
