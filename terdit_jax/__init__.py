"""TerDiT in JAX: ternary diffusion transformers, trained from scratch and run at 2 bits a weight."""

from typing import Any

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """`terdit_jax.load_model`, imported when asked for: `terdit_jax.interop.pytorch` must import without JAX."""
    if name == "load_model":
        from terdit_jax.inference.runtime import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
