"""Damages that a checkpoint on disk can suffer: each damage is done to the directory of one step."""

from pathlib import Path
import shutil

MANIFEST = "sha256.json"


def largest_file(step: Path) -> Path:
    """The largest file of the raw weights."""
    return max((path for path in (step / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step: Path) -> None:
    largest_file(step).write_bytes(largest_file(step).read_bytes()[:-1])


def flip(step: Path) -> None:
    content = bytearray(largest_file(step).read_bytes())
    content[len(content) // 2] ^= 0x10
    largest_file(step).write_bytes(content)


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def half_write(step: Path) -> None:
    """Leaves the step like a kill within a save: under its temporary name, with some of its files, unsigned."""
    temporary = step.with_name(f"{step.name}.orbax-checkpoint-tmp")
    step.rename(temporary)
    (temporary / MANIFEST).unlink()
    largest_file(temporary).unlink()


DAMAGES = {
    "truncated": truncate,
    "flipped": flip,
    "missing_file": lambda step: largest_file(step).unlink(),
    "missing_manifest": lambda step: (step / MANIFEST).unlink(),
    "torn_manifest": lambda step: (step / MANIFEST).write_text("{"),
    "empty_manifest": lambda step: (step / MANIFEST).write_text("{}"),
    "empty_step": empty,
}
# A step under its temporary name was never a checkpoint: it is cleaned away, not set aside.
HALF_WRITTEN = {"half_written": half_write}
