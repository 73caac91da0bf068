"""Checkpoints: asynchronous, verified by SHA-256, and never trusted blindly.

A damaged checkpoint is set aside with a loud line and the step before it is used; one that the disk has no room for is
given up with a loud line and training goes on. What the state means is `state`'s.
"""

from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging as python_logging
import re
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
import numpy as np
import orbax.checkpoint as ocp

from terdit_jax.errors import UserError
from terdit_jax.paths import absolute, as_path

MANIFEST = "sha256.json"
RUN = "run"
# Items of a checkpoint: sampling reads one of the first two and leaves the rest on disk.
_ITEMS = {
    "params": ("params",),
    "ema_params": ("ema_params",),
    "rest": ("step", "opt_state", "skipped", "spikes", "window"),
}
_HALF_WRITTEN = ".orbax-checkpoint-tmp"  # in the names that orbax gives to what is not finished
_CLEAR_SECONDS = 5
_CHUNK_BYTES = 64 << 20

LeafReader = Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]]


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: epath.PathLike, checkpoint: ConfigDict | None = None):
        """Opens `workdir`/checkpoints; without a `config.checkpoint` it is read only.

        Raises:
          UserError: if the directory cannot be written.
        """
        self.directory = absolute(as_path(workdir)) / "checkpoints"
        self._signer: concurrent.futures.Future | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._restored: int | None = None
        self._unsaved: int | None = None
        self._checkpoint = checkpoint
        self._read_only = checkpoint is None
        self._manager = self._open()
        if not self._read_only:
            logging.get_absl_logger().addFilter(_is_no_traceback_of_orbax)
            python_logging.getLogger("asyncio").addFilter(_is_not_of_the_disk)

    def _open(self) -> ocp.CheckpointManager:
        checkpoint, read_only = self._checkpoint, self._read_only
        handlers = {item: ocp.PyTreeCheckpointHandler() for item in _ITEMS}
        verbosity = logging.get_verbosity()
        if read_only:
            logging.set_verbosity(logging.ERROR)  # orbax warns that what is opened to be read is read only
        try:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else checkpoint.keep,
                keep_period=None if read_only else checkpoint.keep_every or None,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=not read_only,
            )
            return ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers | {RUN: ocp.JsonCheckpointHandler()}
            )
        except OSError as error:
            raise UserError(f"cannot use {self.directory}: {error.strerror or error}") from error
        finally:
            logging.set_verbosity(verbosity)

    def steps(self) -> list[int]:
        """The steps on disk, ascending, damaged ones included."""
        return sorted(self._manager.all_steps())

    def save(self, state: dict, run: dict[str, Any]) -> None:
        """Starts saving the state beside `run` (JSON); returns once the arrays are copied off the devices.

        A state may lack items: sampling needs no more than one set of weights. Its step is then `run`'s. A save that
        the disk refuses, now or while it goes on behind training, is reported by `wait`; the ones before it stay.
        """
        step = int(state["step"]) if "step" in state else run["step"]
        present = {item: names for item, names in _ITEMS.items() if set(names) <= set(state)}
        trees = {item: {name: state[name] for name in names} for item, names in present.items()}
        arguments = {item: save_arguments(tree) for item, tree in trees.items()}
        self.wait()
        if step == self._restored:
            return  # it came from there; orbax would refuse to save the step again
        arguments = ocp.args.Composite(**arguments, **{RUN: ocp.args.JsonSave(run)})
        try:
            self._manager.save(step, args=arguments, force=True)
        except (OSError, ValueError) as error:
            self._give_up(step, error)
            return
        self._signer = self._background.submit(self._sign_when_finished, step)

    def delete_beyond(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def restore(self, target: dict) -> tuple[dict, dict[str, Any]] | None:
        """The newest sound state and its run's JSON, or None if there is no checkpoint at all.

        Args:
          target: the whole state or some of its top-level entries, as ShapeDtypeStructs with shardings; whatever mesh
            the checkpoint was saved on.

        Raises:
          UserError: if no checkpoint is sound, or the newest sound one is of another model.
        """
        items = [item for item, names in _ITEMS.items() if set(names) & set(target)]
        steps = self.steps()
        step = self._newest_sound([*items, RUN], set_aside=True)
        if step is None:
            if steps:  # they stay where they are: an empty directory would look like a run that has not begun
                raise UserError(f"{self.directory}: no sound checkpoint among {steps}, nothing to go on from")
            return None
        self._restored = step
        return self._read(step, items, target)

    def newest_run(self) -> dict[str, Any] | None:
        """The JSON of the newest checkpoint whose JSON can be read, or None."""
        step = self._newest_sound([RUN], set_aside=False)
        if step is None:
            return None
        return self._manager.restore(step, args=ocp.args.Composite(**{RUN: ocp.args.JsonRestore()}))[RUN]

    def read_leaves(self, item: str, step: int | None = None) -> tuple[dict[str, Any], LeafReader]:
        """The run's JSON, and the leaves of `params` or `ema_params` as host arrays, one in memory at a time.

        Args:
          item: "params" or "ema_params".
          step: which checkpoint; the newest sound one if left out.

        Returns:
          The JSON, and a function from paths within the parameter tree to a stream of (path, leaf).

        Raises:
          UserError: no such step, or none that is sound.
        """
        if step is None:
            chosen = self._newest_sound([item, RUN], set_aside=False)
        else:
            if step not in self.steps():
                raise UserError(f"{self.directory} has no step {step}: there are {self.steps() or 'none'}")
            if damage := find_damage(self.directory / str(step), [item, RUN]):
                raise UserError(f"checkpoint {step} of {self.directory} is damaged: {damage}")
            chosen = step
        if chosen is None:
            raise UserError(f"{self.directory} holds no sound checkpoint: there are steps {self.steps() or 'none'}")
        run = self._manager.restore(chosen, args=ocp.args.Composite(**{RUN: ocp.args.JsonRestore()}))[RUN]
        return run, functools.partial(self._read_leaves, chosen, item)

    def _read_leaves(self, step: int, item: str, paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        stored = self._manager.item_metadata(step)[item].tree[item]
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

        def read(path: str) -> np.ndarray:
            names = path.split("/")
            leaf = functools.reduce(lambda tree, name: tree[name], names, stored)
            target, restore = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), ocp.RestoreArgs(restore_type=np.ndarray)
            for name in reversed([item, *names]):
                target, restore = {name: target}, {name: restore}
            arguments = ocp.args.PyTreeRestore(target, restore, partial_restore=True)
            (array,) = jax.tree.leaves(reader.restore(self.directory / str(step) / item, args=arguments))
            return array

        for path in paths:
            yield path, read(path)  # no name of ours may keep the leaf alive while the next one is read

    def wait(self) -> bool:
        """Blocks until the save under way is on disk and signed, or given up; whether the latest one is on disk."""
        if self._signer:
            signer, self._signer = self._signer, None
            step, error = signer.result()
            if error:
                self._give_up(step, error)
            else:
                self._unsaved = None
        return self._unsaved is None

    def close(self) -> None:
        """As `wait`, then releases the directory.

        Raises:
          UserError: if the latest save was given up: who ends here would lose what it held.
        """
        complete = self.wait()
        self._background.shutdown()
        self._manager.close()
        logging.get_absl_logger().removeFilter(_is_no_traceback_of_orbax)
        if not complete:
            raise UserError(
                f"checkpoint {self._unsaved} of {self.directory} could not be saved: make room, then go on from "
                f"{max(self.steps(), default='the start')}"
            )

    def _give_up(self, step: int, error: Exception) -> None:
        """One loud line for a save that the disk refused, and the room that its beginning took is free again.

        Raises:
          Exception: the error, if it is not the disk's.
        """
        if not _is_of_the_disk(error):
            raise error
        self._unsaved = step
        logging.error("CHECKPOINT %d COULD NOT BE SAVED (%s): training goes on without it", step, _reason(error))
        with contextlib.suppress(Exception):
            self._manager.close()
        self._clear_half_written()
        self._manager = self._open()  # its list of steps would be wrong
        if step in self.steps():  # there was room for all but its manifest
            self._manager.delete(step)

    def _clear_half_written(self) -> None:
        """Deletes what a save left behind, to which its writers may still add: orbax, which deletes once and behind the
        next manager's back, would lose the next save to that."""
        deadline = time.monotonic() + _CLEAR_SECONDS
        while jax.process_index() == 0 and time.monotonic() < deadline:
            left = [path for path in self.directory.iterdir() if _HALF_WRITTEN in path.name]
            if not left:
                return
            for path in left:
                with contextlib.suppress(OSError):
                    path.rmtree()
            time.sleep(0.05)

    def _read(self, step: int, items: list[str], target: dict) -> tuple[dict, dict[str, Any]]:
        arguments = {}
        for item in items:
            tree = {name: target[name] for name in _ITEMS[item] if name in target}
            self._check_dtypes(step, item, tree)
            arguments[item] = ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**arguments, **{RUN: ocp.args.JsonRestore()})
            )
        except (ValueError, KeyError) as error:  # a tree or a shape that is not the target's
            raise UserError(f"{self.directory / str(step)} holds another model: {_first_line(error)}") from error
        state = {name: restored[item][name] for item in items for name in _ITEMS[item] if name in target}
        return state, restored[RUN]

    def _check_dtypes(self, step: int, item: str, tree: dict) -> None:
        """Orbax casts a leaf of another dtype silently: compare with what is stored before reading."""
        stored = [leaf.dtype for leaf in jax.tree.leaves(self._manager.item_metadata(step)[item].tree)]
        wanted = [leaf.dtype for leaf in jax.tree.leaves(tree)]
        if len(stored) == len(wanted) and any(a != b for a, b in zip(stored, wanted, strict=True)):
            raise UserError(f"checkpoint {step} of {self.directory} holds arrays of another dtype than this model's")

    def _newest_sound(self, items: list[str], *, set_aside: bool) -> int | None:
        """The newest step whose items are sound, or None; the first process reads and decides for all of them."""
        none = -1
        chosen = none
        if jax.process_index() == 0:
            damaged = []
            for step in reversed(self.steps()):
                damage = find_damage(self.directory / str(step), items)
                if damage is None:
                    chosen = step
                    break
                logging.error("CHECKPOINT %d IS DAMAGED (%s): falling back to the step before it", step, damage)
                damaged.append(step)
            if set_aside and chosen != none and not self._read_only:
                self._set_aside(damaged)
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        self._manager.reload()
        return None if chosen == none else chosen

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged steps out of the way: they would be taken for the latest, and their numbers must be free."""
        place = self.directory.parent / "damaged_checkpoints"
        for step in steps:
            place.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(_free_name(place, str(step)))

    def _sign_when_finished(self, step: int) -> tuple[int, Exception | None]:
        """Writes the manifest as soon as orbax has given the step its final name (it offers no call-back so late);
        returns the step, and the error if the disk took it not."""
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(self.directory / str(step))
        except (OSError, ValueError) as error:
            return step, error
        return step, None


def save_arguments(tree: dict) -> ocp.args.PyTreeSave:
    """A tree to store, a chunk a layer, so that who reads a leaf decodes it layer by layer, not all of it twice."""

    def chunks(leaf: jax.Array) -> ocp.SaveArgs:
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())

    return ocp.args.PyTreeSave(tree, jax.tree.map(chunks, tree))


def write_manifest(step_directory: epath.Path) -> None:
    """Records the SHA-256 of every file of a finished checkpoint in the checkpoint itself."""
    digests = _hash_files(step_directory, _files(step_directory))
    temporary = step_directory / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(digests, indent=1, sort_keys=True))
    temporary.rename(step_directory / MANIFEST)


def find_damage(step_directory: epath.Path, items: Iterable[str]) -> str | None:
    """What is wrong with the given items of a checkpoint, or None: checked against the manifest before it is read."""
    try:
        return _find_damage(step_directory, tuple(f"{item}/" for item in items))
    except FileNotFoundError as error:
        return f"{epath.Path(error.filename).name if error.filename else 'a file'} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read: {_first_line(error)}"


def _find_damage(step_directory: epath.Path, prefixes: tuple[str, ...]) -> str | None:
    manifest = step_directory / MANIFEST
    if not manifest.exists():
        return "its SHA-256 manifest is missing"
    recorded = json.loads(manifest.read_text())
    recorded = {name: digest for name, digest in recorded.items() if name.startswith(prefixes)}
    present = {name for name in _files(step_directory) if name.startswith(prefixes)}
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in recorded):
            return f"its manifest lists nothing under {prefix}"
    if missing := sorted(set(recorded) - present):
        return f"{missing[0]} is missing"
    digests = _hash_files(step_directory, recorded)
    changed = sorted(name for name in recorded if digests[name] != recorded[name])
    return f"{changed[0]} does not match its SHA-256" if changed else None


def _files(directory: epath.Path) -> list[str]:
    """Names, relative to the directory, of all files below it but the manifest."""
    found = []
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            found += [f"{entry.name}/{name}" for name in _files(entry)]
        elif not entry.name.startswith(MANIFEST):
            found.append(entry.name)
    return found


def _hash_files(directory: epath.Path, names: Iterable[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = list(names)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _free_name(place: epath.Path, name: str) -> epath.Path:
    candidates = (place / (name if not i else f"{name}.{i}") for i in range(10_000))
    return next(path for path in candidates if not path.exists())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


# TensorStore's own errors are ValueErrors that begin with a status; those of a file system name what failed.
_OF_THE_DISK = re.compile(
    r"(no space left|disk quota|input/output error|file too large|read-only file|resource_exhausted)[^[]*", re.I
)


def _is_of_the_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) or bool(_OF_THE_DISK.search(str(error)))


def _reason(error: Exception) -> str:
    """What the disk said, without the path of the file among thousands that it said it of."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = [match.group().strip() for match in _OF_THE_DISK.finditer(str(error))]
    return found[-1][:200] if found else _first_line(error)


def _is_not_of_the_disk(record: python_logging.LogRecord) -> bool:
    """False for what asyncio logs of orbax's writes that failed beside the one whose error was raised."""
    return not (record.exc_info and record.exc_info[1] and _is_of_the_disk(record.exc_info[1]))


def _is_no_traceback_of_orbax(record: python_logging.LogRecord) -> bool:
    """False for the tracebacks, ten a save, that orbax logs of errors which it also raises: our one line says it."""
    return not (record.exc_info and "/orbax/" in record.pathname)
