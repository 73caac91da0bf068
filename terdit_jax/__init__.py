"""TerDiT in JAX: ternary diffusion transformers, trained from scratch and run at 2 bits a weight."""

import sys
from typing import TYPE_CHECKING, Any

from terdit_jax.interrupts import end_while_importing

if TYPE_CHECKING:
    from terdit_jax.inference.runtime import load_model

__all__ = ["load_model"]
__version__ = "0.2.0"

if sys.argv[:1] == ["-m"] and any(argument.startswith("terdit_jax.") for argument in sys.orig_argv):
    end_while_importing()  # `python -m terdit_jax.COMMAND`, whose imports come before its `run_command`


def __getattr__(name: str) -> Any:
    """Imports `load_model` only when asked for: `terdit_jax.interop.pytorch` must import without JAX."""
    if name == "load_model":
        from terdit_jax.inference.runtime import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
