"""Writes checkpoints: in the background, signed when they are whole; old ones are deleted once a newer one is signed.

A save that the disk refuses is given up with a loud line, and training goes on. Deleting and setting aside are
housekeeping: where they fail a loud line says so, and nothing else is lost.
"""

import concurrent.futures
import contextlib
import errno
import os
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import orbax.checkpoint as ocp

from terdit_jax.checkpoints import disk
from terdit_jax.checkpoints.layout import DAMAGED, ITEMS, RUN, is_half_written
from terdit_jax.checkpoints.manifest import write_manifest
from terdit_jax.checkpoints.reader import Checkpoints
from terdit_jax.config_sections import CheckpointConfig
from terdit_jax.errors import UserError
from terdit_jax.files import set_aside

_CLEAR_SECONDS = 5
_CHUNK_BYTES = 64 << 20


class CheckpointWriter(Checkpoints):
    """The checkpoints of the run that writes them. Attributes:

    signed: the step of the newest that is whole, which the run would go on from; -1 if there is none.
    """

    def __init__(self, workdir: epath.PathLike, checkpoint: CheckpointConfig):
        """Opens `workdir`/checkpoints, and clears what a killed save left in it.

        Args:
          workdir: of the run.
          checkpoint: `config.checkpoint`; `keep` and `keep_every` are read.

        Raises:
          UserError: there can be no such directory.
        """
        super().__init__(workdir)
        self._keep, self._keep_every = checkpoint.keep, checkpoint.keep_every
        self.signed = -1
        self._unsaved: tuple[int, Exception] | None = None
        self._finishing: concurrent.futures.Future | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self._clear_half_written():  # of another user: its name must be free
                self._move_away(path)
        except OSError as error:
            raise UserError(f"cannot use {self.directory}: {disk.reason(error)}") from error
        disk.silence_tracebacks()
        self._background = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._orbax = _open_orbax()

    def save(self, state: dict, run: dict[str, Any]) -> None:
        """Starts to save the state beside `run` (JSON); returns once the arrays are copied off the devices.

        A state may lack items, for sampling needs one set of weights; its step is then that of `run`. If the disk
        refuses the save, now or during training, `wait` reports it; the checkpoints before it stay.
        """
        step = int(state["step"]) if "step" in state else run["step"]
        arguments = {
            item: save_arguments({name: state[name] for name in names})
            for item, names in ITEMS.items()
            if set(names) <= set(state)
        }
        self.wait()
        if step == self.signed:
            return  # it came from there
        if self.path(step).exists():  # damaged, and it could not be set aside
            self._unsaved = step, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            logging.error("CHECKPOINT %d COULD NOT BE SAVED: another stands in its place, move it away", step)
            return
        try:
            self._orbax.save(self.path(step), args=ocp.args.Composite(**arguments, **{RUN: ocp.args.JsonSave(run)}))
        except (OSError, ValueError) as error:
            self._give_up(step, error)
            return
        self._finishing = self._background.submit(self._finish, step)

    def wait(self) -> bool:
        """Blocks until the save under way is signed or given up; returns whether the latest one is on disk."""
        if self._finishing:
            finishing, self._finishing = self._finishing, None
            step, error = finishing.result()
            if error:
                self._give_up(step, error)
            else:
                self._unsaved = None
        return self._unsaved is None

    def close(self) -> None:
        """Waits for the save under way, then releases the directory.

        Raises:
          UserError: the latest save was given up, and what it held would be lost.
        """
        self.wait()
        self._background.shutdown()
        self._orbax.close()
        if self._unsaved:
            step, error = self._unsaved
            raise UserError(
                f"checkpoint {step} of {self.directory} could not be saved ({disk.reason(error)}): "
                f"{disk.remedy(error)}, then go on from {max(self.steps(), default='the start')}"
            )

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        if jax.process_index() == 0:
            for later in self.steps():
                if later > step:
                    self._delete(later)

    def _finish(self, step: int) -> tuple[int, Exception | None]:
        """Signs the step once Orbax has given it its final name, then deletes old ones.

        Returns the step, and the error if the disk did not take it.
        """
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(self.path(step))
        except (OSError, ValueError) as error:
            return step, error
        self.signed = step
        if jax.process_index() == 0:
            with contextlib.suppress(UserError):  # a directory that cannot be listed: the next save tries again
                self._delete_old(step)
        return step, None

    def _delete_old(self, newest: int) -> None:
        """Deletes all but the last ones up to `newest`, which is sound, and those to be kept for good."""
        # Later ones are damaged and could not be moved.
        for step in [step for step in self.steps() if step <= newest][: -self._keep]:
            if not self._keep_every or step % self._keep_every:
                self._delete(step)

    def _delete(self, step: int) -> None:
        try:
            self.path(step).rmtree()
        except OSError as error:
            self._say_once(step, f"COULD NOT BE DELETED ({disk.reason(error)}): delete {self.path(step)} yourself")

    def _give_up(self, step: int, error: Exception) -> None:
        """Says in one loud line that the disk refused a save, and frees the room that its beginning took.

        Raises:
          Exception: the error, if it does not come from the disk.
        """
        if not disk.is_refusal(error):
            raise error
        self._unsaved = step, error
        logging.error("CHECKPOINT %d COULD NOT BE SAVED (%s): training goes on without it", step, disk.reason(error))
        with contextlib.suppress(Exception):
            self._orbax.close()
        self._orbax = _open_orbax()  # what failed in the old one would be raised at every save that follows
        deadline = time.monotonic() + _CLEAR_SECONDS
        with contextlib.suppress(OSError):
            while self._clear_half_written() and time.monotonic() < deadline:  # its writers may still add to it
                time.sleep(0.05)
        if jax.process_index() == 0 and self.path(step).exists():  # there was room for all but its manifest
            self._delete(step)

    def _clear_half_written(self) -> list[epath.Path]:
        """Deletes what saves left; returns what is still there."""
        if jax.process_index() != 0:
            return []
        for path in filter(is_half_written, self.directory.iterdir()):
            with contextlib.suppress(OSError):
                path.rmtree()
        return list(filter(is_half_written, self.directory.iterdir()))

    def _pass_over_unreadable(self, step: int, reason: str) -> None:
        # A run that went on from an older step would do the work of this one again, and could not save it.
        raise UserError(
            f"checkpoint {step} of {self.directory} cannot be read ({reason}): make it readable, or move it away to go "
            "on from the one before it"
        )

    def _go_on_from(self, step: int, damaged: list[int]) -> None:
        """Moves damaged steps away: they would be taken for the latest, and their numbers must be free."""
        self.signed = step
        for number in damaged:
            self._move_away(self.path(number))

    def _move_away(self, path: epath.Path) -> None:
        try:
            set_aside(path, self.directory.parent / DAMAGED)
        except OSError as error:
            logging.error("%s COULD NOT BE SET ASIDE (%s): move it away", path, disk.reason(error))


def _open_orbax() -> ocp.AsyncCheckpointer:
    # A folder that is refused in the background would leave threads, each with its arrays, waiting for five minutes.
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    composite = ocp.CompositeOptions(async_options=options)
    handler = ocp.CompositeCheckpointHandler(composite_options=composite)
    return ocp.AsyncCheckpointer(handler, async_options=options)


def save_arguments(tree: dict) -> ocp.args.PyTreeSave:
    """Returns what stores a tree in a chunk a layer: readers decode a leaf layer by layer, not all of it twice."""

    def chunks(leaf: jax.Array) -> ocp.SaveArgs:
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())

    return ocp.args.PyTreeSave(tree, jax.tree.map(chunks, tree))
