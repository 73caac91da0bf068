"""Sizes of a model, part by part: on disk as an artifact, in memory as it runs, and in full precision beside it."""

import math

import jax
import numpy as np

from terdit_jax.interop.published import constants, model_leaves, params_leaves
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import abstract_params, packed_operands

# (hidden_size, depth) -> lines of the paper's deployment table (arXiv 2405.14854) on models of this shape.
_PAPER = {
    (3072, 32): (
        "paper: TerDiT-4.2B 1.1 GB on disk, 1,919 MB in use while sampling; Large-DiT-4.2B 16 GB and 17,027 MB",
    )
}
_PARTS = (
    ("attention", "blocks/attention/"),
    ("feed-forward", "blocks/feed_forward/"),
    ("adaLN", "blocks/adaLN_modulation/"),
    ("block norms", "blocks/"),
    ("embedders", ""),
    ("final layer", "final_layer/"),
)
_COLUMNS = ("part", "parameters", "ternary", "on disk", "in memory", "bfloat16", "float32")


def size_report(model: DiTConfig, file_bytes: int | None = None) -> str:
    """A table of one line a part, from shapes alone.

    Args:
      model: the architecture; `dtype` is that of full-precision matrices in memory.
      file_bytes: of the file the model came from, if it is one.

    Returns:
      Text. On disk: tensors of an artifact without its header, planes not compressed. In memory: what
      `terdit_jax.load_model` holds on its devices.
    """
    rows = {part: np.zeros(4, np.int64) for part, _ in _PARTS}  # parameters, ternary ones, bytes on disk, in memory
    for leaf in model_leaves(model):
        dtype, shape = leaf.stored(packed=True)
        size = math.prod(leaf.shape)
        stored = (leaf.depth or 1) * math.prod(shape) * dtype.itemsize // leaf.parts
        rows[_part_of(leaf.path)] += (size, size if leaf.ternary else 0, stored, 0)
    rows["embedders"][2] += sum(array.nbytes for array in constants(model).values())
    operands = jax.eval_shape(lambda params: packed_operands(model, params), abstract_params(model))
    for path, array in params_leaves(operands):
        rows[_part_of(path)][3] += array.size * array.dtype.itemsize
    rows["total"] = np.sum(list(rows.values()), axis=0)
    lines = [_line(_COLUMNS)]
    for part, row in rows.items():
        parameters, ternary, disk, memory = map(int, row)
        share = f"{ternary / parameters:.1%}" if parameters else "-"
        sizes = (_megabytes(size) for size in (disk, memory, 2 * parameters, 4 * parameters))
        lines.append(_line((part, f"{parameters:,}", share, *sizes)))
    if file_bytes is not None:
        lines.append(f"this file: {_megabytes(file_bytes)}")
    lines += _PAPER.get((model.hidden_size, model.depth), ())
    return "\n".join(lines)


def _part_of(path: str) -> str:
    return next(part for part, prefix in sorted(_PARTS, key=lambda entry: -len(entry[1])) if path.startswith(prefix))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _line(cells: tuple[str, ...]) -> str:
    first, *rest = cells
    return f"{first:<13}" + "".join(f"{cell:>16}" for cell in rest)
