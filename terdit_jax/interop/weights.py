"""Weights from wherever they are: a training run, our artifact, the published checkpoints, safetensors.

All become the same thing, a description and a stream of parameter leaves; `inference` places them on devices, `start`
makes of them what a training starts with.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
from functools import partial
import os
from pathlib import Path
from typing import Any

from etils import epath
import jax
import numpy as np

from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.errors import UserError
from terdit_jax.interop.artifact import is_artifact, open_artifact, read_description
from terdit_jax.interop.description import Description, describe_run
from terdit_jax.interop.hub import fetch, is_name
from terdit_jax.interop.known import Told, describe_published
from terdit_jax.interop.published import (
    Leaves,
    StateDict,
    check_layout,
    check_values,
    model_leaves,
    params_leaves,
    read_leaves,
)
from terdit_jax.interop.safetensors import open_container
from terdit_jax.interop.shapes import check_architecture
from terdit_jax.interop.torch_file import load_checkpoint, load_namespace
from terdit_jax.model.config import DiTConfig
from terdit_jax.model.transformer import abstract_params
from terdit_jax.paths import as_path, local_path
from terdit_jax.ternary.packing import pack
from terdit_jax.ternary.quantize import Rounding, absmean_codes

_ITEMS = {True: "ema_params", False: "params"}
MODEL_ARGS = "model_args.pth"
HUB_WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers names them


@dataclasses.dataclass(frozen=True)
class Weights:
    """Opened weights. Attributes:

    source: where they come from, as given.
    description: of the model.
    leaves: opens a stream of (path, leaf), one leaf in memory at a time; ternary weights are float32 master weights,
      or (L, out, in / 4) uint8 of `terdit_jax.ternary.packing.pack` where the source holds no more than that.
    masters: whether there are master weights, as always for a full-precision model.
    run: of a workdir, what its checkpoint says of the run (`training.resume.describe_run`), which may be forged.
    """

    source: str
    description: Description
    leaves: Callable[[], Iterator[tuple[str, np.ndarray]]]
    masters: bool
    run: Mapping[str, Any] | None = None

    @property
    def model(self) -> DiTConfig:
        return self.description.model


def open_weights(
    path: epath.PathLike,
    *,
    ema: bool = True,
    step: int | None = None,
    masters: bool = False,
    num_heads: int | None = None,
    objective: str | None = None,
) -> Weights:
    """Finds out what is at a path and opens it; little is read before `leaves` is.

    Args:
      path: a workdir; an artifact or another safetensors file of published names; a folder for the Hub (`exports`);
        a folder of published `consolidated*.pth`, or one such file, with `model_args.pth` beside it; a `.pt` or `.pth`
        of DiT or SiT, a state dict or their training's checkpoint; a folder with one `.safetensors` or `.pt`. Where
        there is nothing of that name, any of these on the Hugging Face Hub (`hub.fetch`), but for a workdir.
      ema: which weights, where there are both.
      step: which checkpoint of a workdir; the newest sound one if left out.
      masters: prefer master weights where a folder holds both those and ternary ones.
      num_heads: of attention, for a DiT or SiT of no published size, whose file does not tell.
      objective: "ddpm" or "flow", for one whose file is not named as published: those of DiT and SiT are alike.

    Raises:
      UserError: nothing there that can be read, a step of something that is no workdir, raw weights of a file that
        holds averaged ones, or an argument that is missing or that the file contradicts.
    """
    told = Told(num_heads, objective)
    told.check()
    weights = _open(path, ema, step, masters, told)
    told.check_agrees(weights.description, weights.source)
    return weights


def is_model(path: epath.PathLike) -> bool:
    """Whether `open_weights` would look for a model there, and not a reader of images: a run, a folder or file of
    safetensors, or what is not on this machine and could be a name on the Hub."""
    place = as_path(path)
    if not place.exists():
        return is_name(path) and place.suffix != ".npz"
    return place.suffix == ".safetensors" or any((place / name).exists() for name in ("checkpoints", HUB_WEIGHTS))


def open_told(path: epath.PathLike, told: Told) -> Weights:
    """Opens averaged weights, or raw ones where there are no others, with master weights if there are; `told` is used
    where a file is silent, and may say something else than the file."""
    return _open(path, True, None, True, told)


def _open(path: epath.PathLike, ema: bool, step: int | None, masters: bool, told: Told) -> Weights:
    """Opens weights; `told` is used where a file is silent."""
    place = as_path(path)
    if (place / "checkpoints").is_dir():
        return _open_workdir(place, ema, step)
    if step is not None:
        raise UserError(f"step {step} was asked for, but {place} is no workdir with checkpoints")
    choose = partial(_choose, os.fspath(place), ema, masters)
    if place.exists():
        local = local_path(place)
        if local.is_dir():
            local /= choose(sorted(os.listdir(local)))[0]
    elif is_name(path):
        local = fetch(os.fspath(path), choose)
    else:
        raise UserError(f"{place} does not exist: give a workdir, an artifact or a published checkpoint")
    is_torch = local.suffix in (".pth", ".pt")
    weights = _open_torch(local, ema, told) if is_torch else _open_container(local, told)
    if weights.description.ema and not ema:
        raise UserError(f"{place} holds averaged weights alone, but raw ones were asked for")
    return weights


def packed_leaves(model: DiTConfig, leaves: Leaves) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves with every ternary weight as 2-bit codes; those that are float32 are ternarised, layer by layer."""
    ternary = {leaf.path for leaf in model_leaves(model) if leaf.ternary}
    for path, array in leaves:
        if path in ternary and array.dtype != np.uint8:
            # Copies, for JAX lets go of a NumPy array that it was given only at some later call: not of a whole leaf.
            array = np.stack([np.asarray(_ternarise(layer.copy(), model.rounding)) for layer in array])
        yield path, array


@partial(jax.jit, static_argnums=1)
def _ternarise(weight: jax.Array, rounding: Rounding) -> jax.Array:
    return pack(absmean_codes(weight, rounding))


def _open_workdir(place: epath.Path, ema: bool, step: int | None) -> Weights:
    run, read = Checkpoints(place).read_leaves(_ITEMS[ema], step)
    description = describe_run(run, ema, str(place))
    paths = [leaf.path for leaf in model_leaves(description.model)]
    shapes = {path: target.shape for path, target in params_leaves(abstract_params(description.model))}

    def checked(leaf: tuple[str, np.ndarray]) -> tuple[str, np.ndarray]:
        path, array = leaf
        if array.shape != shapes[path] or array.dtype != np.float32:
            raise UserError(
                f"{place}: {path} is {array.dtype} {array.shape}, but its configuration makes it float32 {shapes[path]}"
            )
        check_values(array, f"{place}, step {run['step']}: {path}")
        return leaf

    return Weights(str(place), description, lambda: map(checked, read(paths)), masters=True, run=run)


def _open_container(path: Path, told: Told) -> Weights:
    container = open_container(path)
    if is_artifact(container):
        description, state_dict = open_artifact(container, str(path))
    else:
        state_dict = StateDict.of(container.arrays)
        if text := container.metadata.get("description"):
            description = read_description(text, state_dict.layout, str(path))
        else:
            description = describe_published(state_dict.layout, {}, "_raw" not in path.name, str(path), told)
    return _of_state_dict(str(path), description, state_dict)


def _open_torch(path: Path, ema: bool, told: Told) -> Weights:
    """Opens a `.pt`, or a `.pth` with the model_args.pth beside it, which may belong to several files."""
    arrays, averaged = load_checkpoint(path, ema)
    state_dict = StateDict.of(arrays)
    if averaged is None:
        averaged = "_ema" in path.name if path.name.startswith("consolidated") else "_raw" not in path.name
    beside = path.with_name(MODEL_ARGS)
    arguments = load_namespace(beside) if path.suffix == ".pth" and beside.exists() else {}
    if "terdit_jax" in arguments:
        description = Description.from_dict(arguments["terdit_jax"], str(beside))
        check_architecture(description.model, state_dict.layout, str(path))
        description = dataclasses.replace(description, ema=averaged)
    else:
        description = describe_published(state_dict.layout, arguments, averaged, str(path), told)
    return _of_state_dict(str(path), description, state_dict)


def _of_state_dict(source: str, description: Description, state_dict: StateDict) -> Weights:
    model, layout = description.model, state_dict.layout
    with _named(source):
        check_layout(model, layout)

    def leaves() -> Iterator[tuple[str, np.ndarray]]:
        with _named(source):
            yield from read_leaves(model, state_dict)

    return Weights(source, description, leaves, masters=all(dtype != np.uint8 for dtype, _ in layout.values()))


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Has errors begin with where the weights come from."""
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith(source) else UserError(f"{source}: {error}") from error


def _choose(source: str, ema: bool, masters: bool, names: list[str], asked: str = "") -> list[str]:
    """The files that are needed of a folder with these names, that with the weights first; `asked` may name it."""
    arguments = [MODEL_ARGS] * (MODEL_ARGS in names)
    kinds = [consolidated_name(ema, ternary) for ternary in ((False, True) if masters else (True, False))]
    if chosen := asked or next((name for name in (HUB_WEIGHTS, *kinds) if name in names), ""):
        return [chosen, *arguments]
    consolidated = [name for name in names if name.startswith("consolidated") and name.endswith(".pth")]
    if any(not name.endswith(".00-of-01.pth") for name in consolidated):
        part = consolidated[-1]
        raise UserError(f"{source} holds a checkpoint cut into several parts ({part}): only 00-of-01 can be read")
    alone = [name for name in names if name.endswith((".safetensors", ".pt"))]
    if len(alone) == 1:
        return alone
    there = consolidated or [name for name in names if not name.startswith(".")][:5]
    wanted, found = " nor ".join(kinds), f"{', '.join(there)}: give {source}/NAME" if there else "nothing"
    raise UserError(f"{source} holds neither a run's checkpoints/ nor {wanted}: there is {found}")


def consolidated_name(ema: bool, ternary: bool) -> str:
    """The published file name of a state dict."""
    return f"consolidated{'_ema' * ema}{'_ternary' * ternary}.00-of-01.pth"
