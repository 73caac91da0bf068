"""Writes weights in every format that we read: the packed artifact, PyTorch's published layout, plain safetensors, and
the folder that a model is on the Hugging Face Hub.

All take the stream of an opened model, leaf by leaf; `torch` is needed to write a .pth and for nothing else.
"""

import argparse
from collections.abc import Iterator
from functools import partial
import os
from pathlib import Path
from typing import Any

import numpy as np

from terdit_jax.choices import FORMATS
from terdit_jax.errors import UserError
from terdit_jax.files import new_folder, refuse_existing, refusing, write_json, write_text
from terdit_jax.interop.artifact import write_artifact, write_plain
from terdit_jax.interop.description import Description
from terdit_jax.interop.known import public_model_args, public_remark
from terdit_jax.interop.model_card import CardFacts, make_card
from terdit_jax.interop.published import published_layout, published_tensors
from terdit_jax.interop.weights import HUB_WEIGHTS, MODEL_ARGS, Weights, consolidated_name, packed_leaves
from terdit_jax.paths import as_path
from terdit_jax.ternary.quantize import PUBLISHED

_HUB_MODULE = "terdit"  # of the code in a folder for the Hub, a copy of `pytorch`


def export(
    weights: Weights,
    path: str | os.PathLike,
    kind: str,
    *,
    masters: bool = False,
    compress: bool = False,
    facts: CardFacts | None = None,
) -> list[str]:
    """Writes weights; the path appears when everything is on disk.

    Args:
      path: must not exist: a file, or with "torch" and "hub" the folder to make.
      kind: one of FORMATS.
      masters: float32 master weights instead of ternary ones, from which a training could go on; not with "packed".
      compress: deflate the 2-bit planes; with "packed" only.
      facts: for the card, with "hub" only; the name of the folder if left out.

    Returns:
      Remarks for the user, a line each.

    Raises:
      UserError: a path that exists or cannot be written, a kind that this model does not have, or no PyTorch.
    """
    model, path = weights.model, Path(as_path(path, "--output"))
    check_options(kind, masters=masters, compress=compress)
    if kind == "packed" and not model.ternary:
        raise UserError(f"{weights.source} is full precision, nothing to pack: give --format=torch, safetensors or hub")
    if masters and model.ternary and not weights.masters:
        raise UserError(f"{weights.source} holds ternary weights only, there are no master weights to export")
    if kind == "torch":
        _check_public(weights, masters)
    refuse_existing(path)
    ternary = model.ternary and not masters
    layout = published_layout(model, packed=ternary)
    if kind == "torch":
        return _write_torch(path, weights, ternary)
    write = partial(write_artifact, compress=compress) if kind != "safetensors" and ternary else write_plain
    if kind != "hub":
        write(path, weights.description, layout, _tensors(weights, ternary))
        return []
    with refusing(path), new_folder(path) as folder:
        write(folder / HUB_WEIGHTS, weights.description, layout, _tensors(weights, ternary))
        card = make_card(weights, facts or CardFacts(path.name), (folder / HUB_WEIGHTS).stat().length)
        write_json(folder / "config.json", _hub_config(weights.description), indent=2)
        write_text(folder / f"{_HUB_MODULE}.py", Path(__file__).with_name("pytorch.py").read_text(encoding="utf-8"))
        write_text(folder / "README.md", card)
    return []


def _hub_config(description: Description) -> dict[str, Any]:
    """The JSON that `AutoModel` of diffusers reads: a class and where its code is. The architecture and the classes'
    names, as transformers writes them, are there for people: code reads the description in the file of weights."""
    code = {"_class_name": "TerDiT", "auto_map": {"AutoModel": f"{_HUB_MODULE}.TerDiT"}}
    names = {str(label): name for label, name in enumerate(description.class_names)}
    return code | description.to_dict()["model"] | ({"id2label": names} if names else {})


def check_options(kind: str, *, masters: bool, compress: bool) -> None:
    """Raises UserError for options that `export` can follow with no model."""
    if kind not in FORMATS:
        raise UserError(f"--format={kind}: choose one of {', '.join(FORMATS)}")
    if kind == "packed" and masters:
        raise UserError("--masters: a packed artifact holds ternary weights; give --format=torch or safetensors")
    if compress and kind != "packed":
        raise UserError(f"--compress: only --format=packed can be compressed, not {kind}")


def _check_public(weights: Weights, masters: bool) -> None:
    """Raises UserError for weights that the public code would take for another model."""
    model = weights.model
    if model.alpha_per != "matrix":
        raise UserError(
            f"{weights.source} has alpha_per={model.alpha_per!r}, the published layout one scale a matrix: give "
            "--format=packed or safetensors"
        )
    if masters and model.rounding != PUBLISHED:
        raise UserError(
            f"{weights.source} has gamma_per={model.gamma_per!r} and threshold={model.threshold}, and the public code "
            "would make other codes of its master weights: give --format=safetensors, or leave out --masters"
        )


def _tensors(weights: Weights, ternary: bool) -> Iterator[tuple[str, np.ndarray]]:
    leaves = packed_leaves(weights.model, weights.leaves()) if ternary else weights.leaves()
    return published_tensors(weights.model, leaves)


def _write_torch(path: Path, weights: Weights, ternary: bool) -> list[str]:
    """A folder as the public code reads it. torch.save takes a whole state dict, so that much memory is needed."""
    try:
        import torch
    except ImportError as error:
        raise UserError("--format=torch needs PyTorch to write .pth files: pip install torch") from error
    description = weights.description
    file = consolidated_name(description.ema, ternary)
    arguments = {**public_model_args(description), "terdit_jax": description.to_dict()}
    try:
        with refusing(path), new_folder(path) as folder:
            state_dict = {name: torch.from_numpy(np.array(array)) for name, array in _tensors(weights, ternary)}
            torch.save(state_dict, folder / file)
            torch.save(argparse.Namespace(**arguments), folder / MODEL_ARGS)
    except RuntimeError as error:  # torch's way to report a full disk
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0][:150]}") from error
    remark = public_remark(description, path / file)
    return [remark] if remark else []
