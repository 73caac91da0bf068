"""Where the checkpoints of a workdir lie, and which of them are finished: nothing here needs JAX.

What their files hold is read by `reader`; whether they are sound, `manifest` knows.
"""

import re

from etils import epath

from terdit_jax.checkpoints import disk
from terdit_jax.errors import UserError
from terdit_jax.paths import is_remote

RUN = "run"
# Items of a checkpoint: sampling reads one of the first two and leaves the rest on disk.
ITEMS = {
    "params": ("params",),
    "ema_params": ("ema_params",),
    "rest": ("step", "opt_state", "skipped", "spikes", "window"),
}
BEST, DAMAGED = "best", "damaged_checkpoints"  # beside `checkpoints` in a workdir
# Orbax renames what it has finished; on object stores, which cannot rename, it writes a last file.
_HALF_WRITTEN, _COMMITTED = r".*\.orbax-checkpoint-tmp(-\d+)?", "commit_success.txt"


def list_steps(directory: epath.Path) -> list[int]:
    """Returns the steps in a folder of checkpoints, ascending, damaged ones included.

    Raises:
      UserError: the directory cannot be listed.
    """
    try:
        return sorted(int(path.name) for path in directory.iterdir() if _is_step(path))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot read {directory}: {disk.reason(error)}") from error


def is_half_written(path: epath.Path) -> bool:
    """Returns whether Orbax has not finished what is here."""
    if is_remote(path):
        return _is_number(path.name) and not (path / _COMMITTED).exists()
    return re.fullmatch(_HALF_WRITTEN, path.name) is not None


def _is_step(path: epath.Path) -> bool:
    return _is_number(path.name) and path.is_dir() and not is_half_written(path)


def _is_number(name: str) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]*", name) is not None
