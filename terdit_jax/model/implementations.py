"""Which implementation of attention, of the passes between a block's matmuls and of the way through the layers runs on
the devices at hand."""

import jax

from terdit_jax.kernels import rows
from terdit_jax.model.config import DiTConfig


def attention_implementation(config: DiTConfig) -> str:
    """cuDNN's fused attention takes 16-bit inputs on GPUs, of heads that it knows; XLA's is right everywhere."""
    if config.attention != "auto":
        return config.attention
    return "cudnn" if jax.default_backend() == "gpu" and config.fits_cudnn(128) else "xla"


def scans_layers(config: DiTConfig) -> bool:
    """Whether one compiled block is scanned over the depth."""
    layers = layers_on(jax.default_backend()) if config.layers == "auto" else config.layers
    return layers == "scanned"


def layers_on(platform: str) -> str:
    """What `config.layers` "auto" is there. Unrolled, a step takes longer to compile, and on GPUs a tenth less to run:
    a loop copies into stacks what is kept for the backward pass, and gradients."""
    return "unrolled" if platform == "gpu" else "scanned"


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
