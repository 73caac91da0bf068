"""What watches a run without taking part in it: the account of its time, its heartbeat, its traces."""

from etils import epath
import jax

from terdit_jax.training.goodput import Goodput
from terdit_jax.training.heartbeat import HEARTBEAT_FILE, Heartbeat
from terdit_jax.training.profile import Profiler, Steps


class Observers:
    """The observers of one process of a run."""

    def __init__(self, workdir: epath.Path, heartbeat: epath.PathLike | None = None, profile: Steps | None = None):
        """Begins the account and beats once.

        Args:
          workdir: of the run.
          heartbeat: the file that every process renews; WORKDIR/heartbeat.json, renewed by the first, if left out.
          profile: the steps to trace; none if left out.
        """
        self.goodput = Goodput(workdir)
        self.profiler = Profiler(workdir, profile)
        self._heartbeat = None
        if heartbeat or jax.process_index() == 0:
            self._heartbeat = Heartbeat(heartbeat or workdir / HEARTBEAT_FILE)
        self.beat(0, now=True)

    def beat(self, step: int, *, now: bool = False) -> None:
        """Renews the heartbeat if that is due, or `now`."""
        if self._heartbeat:
            self._heartbeat.beat(step, now=now)
