"""The best checkpoint of a run: the averaged weights that have scored best, apart from those that it goes on from.

How weights are judged comes in as a function. WORKDIR/best is a workdir of its own to whoever draws or exports.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from terdit_jax.checkpoints.layout import BEST
from terdit_jax.checkpoints.writer import CheckpointWriter
from terdit_jax.config_sections import CheckpointConfig
from terdit_jax.errors import UserError
from terdit_jax.untrusted import is_number


class Judgement(NamedTuple):
    """Scores of samples drawn from some weights. Attributes:

    figures: what is logged.
    loss: what the best weights have least of, one of the figures or made from them.
    """

    figures: dict[str, float]
    loss: float


Judge = Callable[[int, dict], Judgement]  # called with (step, EMA parameters) by every process


class BestCheckpoint:
    """WORKDIR/best; the one before it is kept until the next, in case the newest is damaged."""

    def __init__(self, workdir: epath.PathLike, start_step: int):
        """Opens it for a run that goes on from `start_step`; what a lost continuation found later is dropped."""
        keep = CheckpointConfig(keep=2)
        self._checkpoints = CheckpointWriter(epath.Path(workdir) / BEST, keep)
        self._checkpoints.delete_after(start_step)
        run = self._checkpoints.newest_run()
        loss: Any = run.get("loss") if run else None
        self._loss = loss if is_number(loss, -math.inf, math.inf) else math.inf

    def offer(self, ema_params: dict, run: dict[str, Any], loss: float) -> bool:
        """Saves the weights if they are the best so far; returns whether they are, once they are on disk.

        Args:
          ema_params: averaged parameters, on the mesh.
          run: of `resume.describe_run`.
          loss: of `Judgement`; one that is not finite is never the best.
        """
        loss = _agreed(loss)
        if not loss < self._loss:
            return False
        self._checkpoints.save({"ema_params": ema_params}, run | {"loss": loss})
        if not self._checkpoints.wait():  # waiting, so that no checkpoint to go on from is ever ahead of the best one
            return False
        self._loss = loss
        return True

    def close(self) -> None:
        """Releases the directory."""
        self._checkpoints.close()


def open_best(workdir: epath.PathLike, start_step: int) -> BestCheckpoint | None:
    """Opens it, or returns None if a run that goes on cannot have it: that run has a sound state all the same.

    Raises:
      UserError: a run that begins cannot have it.
    """
    try:
        return BestCheckpoint(workdir, start_step)
    except UserError as error:
        if not start_step:
            raise
        logging.error("THE BEST WEIGHTS ARE NOT KEPT: %s", error)
        return None


def _agreed(loss: float) -> float:
    """The loss of the first process, in float32: all must decide alike, with several processes or one."""
    rounded = np.float32(loss)
    if jax.process_count() > 1:
        rounded = multihost_utils.broadcast_one_to_all(rounded)
    return float(rounded)
