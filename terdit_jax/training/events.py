"""TensorBoard's events of a run, written as they come: the library's own thread would die of a full disk unseen.

tensorboardX is imported by those who write events alone: it imports PyTorch where that is installed, for seconds.
"""

import time
from typing import TYPE_CHECKING, Any

from etils import epath
import numpy as np

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary


class Events:
    """One events file; methods raise OSError where it cannot be written, after which it is of no more use."""

    def __init__(self, workdir: epath.PathLike, start_step: int):
        """Opens a new file, which tells TensorBoard to drop what an earlier one holds after `start_step`."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._file = EventsWriter(str(epath.Path(workdir) / "events"))
        for purge in ({"file_version": "brain.Event:2"}, {"session_log": SessionLog(status=SessionLog.START)}):
            self._append(start_step + 1, **purge)
        self._file.flush()

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Figures by name."""
        from tensorboardX import summary

        self._write(step, [summary.scalar(name, value) for name, value in figures.items()])

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """(H, W, 3) uint8."""
        from tensorboardX import summary

        self._write(step, [summary.image(name, image, dataformats="HWC")])

    def close(self) -> None:
        """Releases the file."""
        self._file.close()

    def _write(self, step: int, summaries: "list[Summary]") -> None:
        for one in summaries:
            self._append(step, summary=one)
        self._file.flush()

    def _append(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), step=step, **content))
