"""Reads checkpoints: verified by SHA-256 and never trusted blindly.

The newest sound one is used, and each one passed over is named in a loud line. Nothing is moved or deleted here:
`writer` does that. What the state means belongs to `training.state`.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import functools
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from terdit_jax.checkpoints import disk
from terdit_jax.checkpoints.layout import ITEMS, RUN, list_steps
from terdit_jax.checkpoints.manifest import find_damage
from terdit_jax.errors import UserError
from terdit_jax.paths import absolute, as_path

_NONE, _REFUSED = -1, -2  # in the place of a step

LeafReader = Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]]


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: epath.PathLike):
        self.directory = absolute(as_path(workdir)) / "checkpoints"
        self._said: set[tuple[int, str]] = set()

    def steps(self) -> list[int]:
        """Returns the steps on disk, ascending, damaged ones included.

        Raises:
          UserError: the directory cannot be listed.
        """
        return list_steps(self.directory)

    def path(self, step: int) -> epath.Path:
        """Returns where the checkpoint of a step is, or would be."""
        return self.directory / str(step)

    def restore(self, target: dict) -> tuple[dict, dict[str, Any]] | None:
        """Reads the newest sound state and its run's JSON; returns None if there is no checkpoint at all.

        Args:
          target: the whole state or some of its top-level entries, as ShapeDtypeStructs with shardings; whatever mesh
            the checkpoint was saved on.

        Raises:
          UserError: if no checkpoint is sound, or the newest sound one is of another model.
        """
        items = [item for item, names in ITEMS.items() if set(names) & set(target)]
        step, damaged = self._newest_sound([*items, RUN])
        if step is None:
            if steps := self.steps():  # they stay: an empty directory would look like a run that has not begun
                raise UserError(f"{self.directory}: no sound checkpoint among {steps}, nothing to go on from")
            return None
        self._go_on_from(step, damaged)
        return self._read(step, items, target)

    def newest_run(self) -> dict[str, Any] | None:
        """Reads the JSON of the newest checkpoint in which it is sound; returns None if there is none."""
        step, _ = self._newest_sound([RUN])
        return None if step is None else self._read_run(step)

    def read_leaves(self, item: str, step: int | None = None) -> tuple[dict[str, Any], LeafReader]:
        """Reads the run's JSON, and leaves of `params` or `ema_params` as host arrays, one in memory at a time.

        Args:
          item: "params" or "ema_params".
          step: which checkpoint; the newest sound one if left out.

        Returns:
          The JSON, and a function from paths in the parameter tree to a stream of (path, leaf).

        Raises:
          UserError: no such step, or none that is sound.
        """
        if step is None:
            step, _ = self._newest_sound([item, RUN])
        elif step not in self.steps():
            raise UserError(f"{self.directory} has no step {step}: there are {self.steps() or 'none'}")
        else:
            try:
                damage = find_damage(self.path(step), [item, RUN])
            except OSError as error:
                raise UserError(f"{self.path(step)} cannot be read: {disk.reason(error)}") from error
            if damage:
                raise UserError(f"checkpoint {step} of {self.directory} is damaged: {damage}")
        if step is None:
            raise UserError(f"{self.directory} holds no sound checkpoint: there are steps {self.steps() or 'none'}")
        return self._read_run(step), functools.partial(self._read_leaves, step, item)

    def _read_run(self, step: int) -> dict[str, Any]:
        with _reading(self.path(step) / RUN):
            run = ocp.JsonCheckpointHandler().restore(self.path(step) / RUN)
        if not isinstance(run, dict):
            raise UserError(f"{self.path(step) / RUN}: describes no run")
        return run

    def _read_leaves(self, step: int, item: str, paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        folder, handler = self.path(step) / item, ocp.PyTreeCheckpointHandler()
        with _reading(folder):
            stored = handler.metadata(folder).tree[item]

        def read(path: str) -> np.ndarray:
            names = path.split("/")
            leaf = functools.reduce(lambda tree, name: tree[name], names, stored)

            def nested(value: Any) -> Any:
                return functools.reduce(lambda tree, name: {name: tree}, reversed([item, *names]), value)

            target, restore = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), ocp.RestoreArgs(restore_type=np.ndarray)
            arguments = ocp.args.PyTreeRestore(nested(target), nested(restore), partial_restore=True)
            (array,) = jax.tree.leaves(handler.restore(folder, args=arguments))
            return array

        for path in paths:
            with _reading(folder):
                array = read(path)
            yield path, array
            del array  # no name of ours may keep the leaf alive while the next one is read

    def _read(self, step: int, items: list[str], target: dict) -> tuple[dict, dict[str, Any]]:
        state: dict[str, Any] = {}
        handler = ocp.PyTreeCheckpointHandler()
        for item in items:
            folder = self.path(step) / item
            tree = {name: target[name] for name in ITEMS[item] if name in target}
            with _reading(folder):
                self._check_dtypes(step, tree, handler.metadata(folder).tree)
            arguments = ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
            try:
                state |= handler.restore(folder, args=arguments)
            except Exception as error:  # Orbax raises errors of any class, for what TensorStore finds in a file too
                cause = error.__cause__ or error
                if disk.is_refusal(cause):
                    raise UserError(f"{self.path(step)} cannot be read: {disk.reason(cause)}") from error
                # The tree or a shape differs from the target's.
                raise UserError(f"{self.path(step)} holds another model: {_first_line(cause)}") from error
        return state, self._read_run(step)

    def _check_dtypes(self, step: int, tree: dict, stored: dict) -> None:
        """Raises UserError for other dtypes than those stored: Orbax would cast silently."""
        found = [leaf.dtype for leaf in jax.tree.leaves(stored)]
        wanted = [leaf.dtype for leaf in jax.tree.leaves(tree)]
        if len(found) == len(wanted) and any(a != b for a, b in zip(found, wanted, strict=True)):
            raise UserError(f"checkpoint {step} of {self.directory} holds arrays of another dtype than this model's")

    def _newest_sound(self, items: list[str]) -> tuple[int | None, list[int]]:
        """The newest step whose items are sound, or None, and the damaged ones after it.

        The first process reads, and decides for all; only it knows the damaged ones.
        """
        chosen, refusal = _NONE, None
        damaged: list[int] = []
        if jax.process_index() == 0:
            try:
                chosen, damaged = self._search(items)
            except UserError as error:  # the others must hear of it too
                chosen, refusal = _REFUSED, error
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        if chosen == _REFUSED:
            raise refusal or UserError(f"{self.directory}: the first process could not read it")
        return None if chosen == _NONE else chosen, damaged

    def _search(self, items: list[str]) -> tuple[int, list[int]]:
        damaged: list[int] = []
        for step in reversed(self.steps()):
            try:
                damage = find_damage(self.path(step), items)
            except OSError as error:
                self._pass_over_unreadable(step, disk.reason(error))
                continue
            if damage is None:
                return step, damaged
            self._say_once(step, f"IS DAMAGED ({damage}): falling back to the step before it")
            damaged.append(step)
        return _NONE, damaged

    def _pass_over_unreadable(self, step: int, reason: str) -> None:
        self._say_once(step, f"CANNOT BE READ ({reason}): falling back to the step before it")

    def _go_on_from(self, step: int, damaged: list[int]) -> None:
        """Called when `restore` has chosen a step; reading moves nothing."""

    def _say_once(self, step: int, what: str) -> None:
        if (step, what) not in self._said:
            self._said.add((step, what))
            logging.error("CHECKPOINT %d %s", step, what)


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Turns whatever Orbax raises into one line: content may have the right SHA-256 and yet be no checkpoint."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = disk.reason(error) if disk.is_refusal(error) else f"no such checkpoint ({_first_line(error)})"
        raise UserError(f"{path} cannot be read: {said}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
