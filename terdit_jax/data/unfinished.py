"""A data set under construction, shared by all who write it: its plan, its finished shards, what was left out.

All of it lies in a folder `.unfinished` inside the data set, on whatever file system that is, and only ever changes by
the renaming of whole files; the builder decides what goes into a shard.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
from typing import Any

from etils import epath

from terdit_jax.data import schema
from terdit_jax.errors import UserError
from terdit_jax.files import new_file, write_json
from terdit_jax.untrusted import difference, is_count, is_number, parse_json, reading

PLAN_FILE = "plan.json"


@dataclasses.dataclass(frozen=True)
class FinishedShard:
    """A shard in its place: the metadata's entry, its latents' moments (C numbers each), images left out."""

    shard: schema.Shard
    count: int  # latent vectors
    total: tuple[float, ...]
    total_square: tuple[float, ...]
    skipped: tuple[tuple[str, str], ...]  # source_id and reason


class Unfinished:
    """The folder of a data set that is being written to `path`.

    Raises:
      UserError: `path` holds something else, or an unfinished data set of another plan.
    """

    def __init__(self, path: epath.Path, plan: dict[str, Any]):
        self.path = path
        self.folder = path / schema.UNFINISHED_FOLDER
        check_free(path)
        plan = json.loads(json.dumps(plan))
        if found := self._read(PLAN_FILE):
            if change := difference(found, plan):
                raise UserError(
                    f"--output={path}: holds an unfinished data set, whose {change}; finish that one, or delete it, as "
                    "when images have changed since it was begun, or name another directory"
                )
        else:
            write_json(self.folder / PLAN_FILE, plan)

    def finished(self, file: str) -> FinishedShard | None:
        """The shard of this name, None while it is missing or not as large as it was."""
        content, path = self._read(f"{file}.json"), self.path / file
        if content is None:
            return None
        with reading(f"{self.folder / file}.json is damaged: delete it and run again"):
            finished = _parse(content, file)
        return finished if path.exists() and path.stat().length == finished.shard.bytes else None

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[epath.Path]:
        """A local path to write to; what is there in the end appears whole as `name` in the data set, or not at all."""
        with new_file(self.path / name, scratch=self.folder) as temporary:
            yield temporary

    def add(self, finished: FinishedShard) -> None:
        """Remembers a shard whose file is in its place."""
        write_json(self.folder / f"{finished.shard.file}.json", dataclasses.asdict(finished))

    def remove(self) -> None:
        """Removes the folder, with what killed workers have left in it; the data set is complete."""
        with contextlib.suppress(FileNotFoundError):  # another worker does the same
            self.folder.rmtree()

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        return parse_json(content, f"{self.folder / name} is damaged, delete it and run again: it", dict)


def _parse(content: dict[str, Any], file: str) -> FinishedShard:
    """A finished shard of untrusted JSON. Raises ValueError, KeyError or TypeError."""
    finished = FinishedShard(
        shard=schema.parse_shard(content["shard"]),
        count=content["count"],
        total=tuple(content["total"]),
        total_square=tuple(content["total_square"]),
        skipped=tuple((source_id, reason) for source_id, reason in content["skipped"]),
    )
    if finished.shard.file != file:
        raise ValueError(f"it is of {finished.shard.file}")
    if not is_count(finished.count, 0, 1 << 53) or len(finished.total) != len(finished.total_square):
        raise ValueError("its moments are none")
    if not all(is_number(value, -1e30, 1e30) for value in finished.total + finished.total_square):
        raise ValueError("its moments are no numbers")
    if not all(isinstance(text, str) for entry in finished.skipped for text in entry):
        raise ValueError("its list of what was left out holds something else than text")
    return finished


def check_free(path: epath.Path) -> None:
    """Raises UserError if `path` is a file, or a directory with files that are not those of an unfinished data set."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"--output={path}: is a file, name a directory")
    if not (path / schema.UNFINISHED_FOLDER).exists() and any(path.iterdir()):
        raise UserError(f"--output={path}: holds other files, name an empty or new directory")


def totals(shards: Sequence[FinishedShard]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, C numbers each, of draws from the posteriors of all the shards' records."""
    count = sum(shard.count for shard in shards)
    sums = ((shard.total for shard in shards), (shard.total_square for shard in shards))
    means, squares = ([sum(values) / count for values in zip(*columns, strict=True)] for columns in sums)
    return tuple(means), tuple(max(square - mean**2, 0.0) ** 0.5 for mean, square in zip(means, squares, strict=True))
