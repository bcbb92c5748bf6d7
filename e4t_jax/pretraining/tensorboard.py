"""What TensorBoard shows of a run: scalars and pictures by step, in its own files."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8


def can_write() -> bool:
    """Whether the library that writes such files is installed; it belongs to the extra `tensorboard`."""
    return importlib.util.find_spec("tensorboardX") is not None


class Events:
    """One file of events in a folder, of those that TensorBoard reads there together.

    From the first step that this one tells of, what files before it told is void: the run went on from before it.

    Errors: `OSError` when the file cannot be written.
    """

    def __init__(self, folder: Path, first: int):
        # Not its SummaryWriter: that writes in a thread, in which a full disk is nobody's error.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        self._write(first, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""
        from tensorboardX import summary

        for name, value in figures.items():
            self._write(step, summary=summary.scalar(name, value))
        self._file.flush()

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "height width 3"]) -> None:
        """A picture of a step."""
        from tensorboardX import summary

        self._write(step, summary=summary.image(name, picture, dataformats="HWC"))
        self._file.flush()

    def _write(self, step: int, **content: object) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), step=step, **content))
