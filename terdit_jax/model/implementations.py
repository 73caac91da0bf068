"""Which implementation of attention, and of the passes between a block's matmuls, runs on the devices at hand."""

import jax

from terdit_jax.kernels import rows
from terdit_jax.model.config import DiTConfig


def attention_implementation(config: DiTConfig) -> str:
    """cuDNN's fused attention takes 16-bit inputs on GPUs; XLA's is right everywhere."""
    if config.attention == "auto":
        return "cudnn" if jax.default_backend() == "gpu" and config.dtype == "bfloat16" else "xla"
    return config.attention


def has_fused_passes(config: DiTConfig) -> bool:
    """Whether training runs blocks as `fused.fused_block`: on Hopper GPUs in bfloat16, each with whole rows."""
    if config.passes == "xla" or config.dtype != "bfloat16" or not rows.run_on(jax.devices()[0]):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["tensor"] > 1:
        return False
    if not config.qk_norm or config.num_kv_heads != config.num_heads:
        return False
    return rows.supports(config.hidden_size, config.mlp_width)
