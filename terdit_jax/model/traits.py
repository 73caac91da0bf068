"""The traits of a family of networks: what its blocks are made of, and which fields of the configuration it takes.

`model.config` gives a configuration the traits of its `family`; the rest of the code asks for traits, not for names.
"""

import dataclasses
from typing import Any, Literal

Norm = Literal["rms", "layer"]  # of a block, before modulation: RMSNorm with a scale, LayerNorm without parameters
NORM_EPS: dict[Norm, float] = {"rms": 1e-5, "layer": 1e-6}


@dataclasses.dataclass(frozen=True)
class Traits:
    """The traits of one family. Attributes:

    norm: of `Norm`.
    feed_forward: "swiglu" (w1, w2, w3) or "gelu" (fc1, fc2).
    biases: whether the linear maps of attention and feed-forward have them.
    rope: whether queries and keys are rotated by their token's place.
    grouped_heads: whether keys and values may have fewer heads than queries.
    max_condition_width: the condition is hidden_size wide, but no wider than this.
    takes: values of fields that a model of the family may have, where it may not have all.
    """

    norm: Norm
    feed_forward: Literal["swiglu", "gelu"]
    biases: bool
    rope: bool
    grouped_heads: bool
    max_condition_width: float
    takes: dict[str, tuple[Any, ...]]


FAMILIES = {
    "large_dit": Traits(  # Large-DiT and TerDiT (arXiv 2405.14854)
        norm="rms",
        feed_forward="swiglu",
        biases=False,
        rope=True,
        grouped_heads=True,
        max_condition_width=1024,
        takes={"positions": ("rope_1d", "rope_1d_sincos_2d")},
    ),
    "dit": Traits(  # DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740)
        norm="layer",
        feed_forward="gelu",
        biases=True,
        rope=False,
        grouped_heads=False,
        max_condition_width=float("inf"),
        takes={"positions": ("sincos_2d",), "qk_norm": (False,)},
    ),
}
