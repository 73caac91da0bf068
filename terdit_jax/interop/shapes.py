"""Reads an architecture from the names and shapes of a state dict's tensors, for either family of blocks.

Nothing is sized by what a file says before it has been compared with this.
"""

import math
from typing import Any

import numpy as np

from terdit_jax.errors import UserError
from terdit_jax.interop.published import POSITIONS, Layout
from terdit_jax.model.config import DiTConfig


def check_architecture(model: DiTConfig, layout: Layout, source: str) -> None:
    """Compares a described model with the shapes of the tensors, before anything is sized by the description.

    Raises:
      UserError: naming the first field that does not fit.
    """
    facts = read_facts(layout, source)
    if not model.ternary:
        facts["adaln_rms_norm"] = model.adaln_rms_norm  # a full-precision model has none, whatever the field says
    for name, value in facts.items():
        described = model.patch_size**2 * model.in_channels if name == "patch_width" else getattr(model, name)
        if described != value:
            raise UserError(f"{source}: describes a model with {name}={described}, its tensors have {value}")


def read_facts(layout: Layout, source: str) -> dict[str, Any]:
    """Fields of the architecture that names and shapes alone tell, `family` first; never the number of heads.

    Raises:
      UserError: tensors of neither family; `source` names them.
    """
    if any(name.startswith("layers.") for name in layout) or "x_embedder.weight" in layout:
        owner, read = "TerDiT or Large-DiT", _large_dit_facts
    elif POSITIONS in layout or "x_embedder.proj.weight" in layout:
        owner, read = "DiT or SiT", _dit_facts
    else:
        raise UserError(
            f"{source}: not a checkpoint of TerDiT, Large-DiT, DiT or SiT, it has neither a tensor 'x_embedder.weight' "
            f"nor 'x_embedder.proj.weight'"
        )
    try:
        return read(layout)
    except (KeyError, ValueError, IndexError) as error:
        missing = f"tensor {error.args[0]!r}" if isinstance(error, KeyError) else "matrices where they belong"
        raise UserError(f"{source}: not a {owner} checkpoint, it lacks {missing}") from error


def _large_dit_facts(layout: Layout) -> dict[str, Any]:
    hidden_size, patch_width = layout["x_embedder.weight"][1]
    block = "layers.0."
    return {
        "family": "large_dit",
        "hidden_size": hidden_size,
        "patch_width": patch_width,
        "depth": sum(name.startswith("layers.") and name.endswith(".ffn_norm.weight") for name in layout),
        "num_classes": layout["y_embedder.embedding_table.weight"][1][0] - 1,
        "kv_width": _rows(layout[f"{block}attention.wk.weight"]),
        "mlp_width": _rows(layout[f"{block}feed_forward.w1.weight"]),
        "ternary": f"{block}attention.wq.alphas" in layout,
        "qk_norm": f"{block}attention.q_norm.weight" in layout,
        "adaln_rms_norm": f"{block}adaLN_modulation.2.weight" in layout,
    }


def _dit_facts(layout: Layout) -> dict[str, Any]:
    hidden_size, channels, patch_size, _ = layout["x_embedder.proj.weight"][1]
    _, tokens, width = layout[POSITIONS][1]
    if width != hidden_size:  # the model's table would be larger than the file
        raise ValueError("positions of another width")
    return {
        "family": "dit",
        "hidden_size": hidden_size,
        "in_channels": channels,
        "patch_size": patch_size,
        "input_size": math.isqrt(tokens) * patch_size,
        "learn_sigma": layout["final_layer.linear.weight"][1][0] == 2 * patch_size**2 * channels,
        "depth": sum(name.startswith("blocks.") and name.endswith(".mlp.fc1.weight") for name in layout),
        "num_classes": layout["y_embedder.embedding_table.weight"][1][0] - 1,
        "ternary": "blocks.0.attn.qkv.alphas" in layout,
        "adaln_rms_norm": "blocks.0.adaLN_modulation.2.weight" in layout,
    }


def _rows(tensor: tuple[np.dtype, tuple[int, ...]]) -> int:
    dtype, shape = tensor
    return shape[0] * (4 if dtype == np.uint8 else 1)
