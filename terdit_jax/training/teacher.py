"""A trained model that a run learns from as well, and the term that it adds to the loss.

Which model it is, and whether it fits the run, belongs to `inference.teacher`.
"""

from collections.abc import Callable
import dataclasses
from functools import partial

import jax
from jax import Array
import jax.numpy as jnp


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["operands"],
    meta_fields=["predict", "weight", "fingerprint", "title"],
)
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher. It is a tree of its operands, so that a jitted step takes it as an argument. Attributes:

    operands: of its forward pass, on the mesh.
    predict: (operands, x_t (B, H, W, C), t (B,), y (B,)) -> (B, H, W, C or 2 C) float32, the prediction first.
    weight: of its term in what the gradient is taken of.
    fingerprint: SHA-256 of its weights as stored; "" where they have not been read.
    title: where it comes from and what it is, for people.
    """

    operands: dict
    predict: Callable[[dict, Array, Array, Array], Array]
    weight: float
    fingerprint: str = ""
    title: str = ""

    def __str__(self) -> str:
        return f"{self.title}, weight {self.weight:g}"

    def distance(self, out: Array, x_t: Array, t: Array, y: Array) -> Array:
        """The mean squared distance () float32 of a network's prediction from the teacher's at the same inputs.

        Noise or velocity alone: a variance in the channels after them is not compared. Source: the first stage of
        BitsFusion (arXiv 2406.04333, section 4.2), with the loss on the data kept beside it.

        Args:
          out: (B, H, W, C or 2 C) float32, the network's output.
          x_t, t, y: (B, H, W, C), (B,) and (B,), what both are given: a label dropped for one is dropped for the other.
        """
        channels = x_t.shape[-1]
        taught = self.predict(self.operands, x_t, t, y)
        return jnp.mean(jnp.square(out[..., :channels] - taught[..., :channels]))
