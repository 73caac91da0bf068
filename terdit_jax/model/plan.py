"""How a model is run. The plain way lives here and reads as the equations do; `fast.plan` derives quicker ones."""

import dataclasses

from jax import Array
import optax

from terdit_jax.model.attention import Implementation
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.depth import Watch, scan_blocks
from terdit_jax.model.layers import MakeLinear, trained_linear
from terdit_jax.model.transformer import make_operands


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plain plan. It is hashable, and its text is the line that a run prints.

    attention: implementation of `jax.nn.dot_product_attention`.
    layers: "scanned" or "unrolled".
    """

    attention: Implementation = "xla"
    layers: str = "scanned"

    def make_operands(self, config: DiTConfig, params: dict, make_linear: MakeLinear | None = None) -> dict:
        """The operands for training; see `model.transformer.make_operands`. `make_linear` takes the place of the
        plan's own, under a plan of full precision."""
        return make_operands(config, params, make_linear or trained_linear)

    def run_blocks(
        self, config: DiTConfig, operands: dict, x: Array, c: Array, rope: Array | None, watch: Watch | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Runs the blocks over the depth; see `model.depth.scan_blocks`."""
        return scan_blocks(config, operands, x, c, rope, watch)

    def gradient_norm(self, grads: dict) -> Array:
        """The root of the sum of all squares."""
        return optax.tree.norm(grads)

    def __str__(self) -> str:
        return "plain: scanned blocks, XLA's attention, matmuls in the activations' dtype"


PLAIN = Plan()
