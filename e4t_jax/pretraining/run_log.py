"""What a run is doing, in files that other programs read: lines of JSON, TensorBoard's events, samples, and what the run is."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from e4t_jax.data.images import encode_png
from e4t_jax.errors import UserError
from e4t_jax.pretraining.tensorboard import Events, can_write
from e4t_jax.storage import to_json, write_file
from e4t_jax.training.flops import peak_of

_LIBRARIES = ("e4t-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunLog:
    """Appends to FOLDER/metrics.jsonl, and to TensorBoard's files in FOLDER/tensorboard where their library is installed.

    A line has the step, the figures, seconds per step, images per second, seconds left, 10¹² operations per device and second,
    their share of the device's peak, and seconds since 1970. Of two lines of one step the later one holds: the run was resumed from
    before it. The first line after a start has no speed, for compiling is not training.

    Errors: `UserError` when the folder cannot be written.
    """

    def __init__(self, folder: Path, batch_size: int, steps: int, facts: Mapping[str, Any]):
        self.folder = folder
        self.file = folder / "metrics.jsonl"
        self.batch_size = batch_size
        self.steps = steps
        self.peak = peak_of(jax.devices()[0].device_kind)
        self._last: tuple[int, float] | None = None
        self._tells = can_write()
        self._events: Events | None = None
        versions = {name: _version(name) for name in _LIBRARIES}
        machine = {"python": platform.python_version(), "devices": jax.devices()[0].device_kind, "processes": jax.process_count()}
        write_file(folder / "run.json", to_json({"settings": facts, "versions": versions, "machine": machine}))

    def record(self, step: int, figures: Mapping[str, float], tflop: float | None = None) -> dict[str, float]:
        """Notes the figures of a step, of which a device computes `tflop` (10¹² operations); gives the line.

        Errors: `UserError` when the files cannot be written.
        """
        now = time.monotonic()
        line: dict[str, float] = {"step": step, **figures}
        if self._last is not None:
            seconds = (now - self._last[1]) / (step - self._last[0])
            speed = {"seconds_per_step": seconds, "images_per_second": self.batch_size / seconds}
            line |= {**speed, "seconds_left": seconds * (self.steps - step)}
            if tflop is not None:
                line["tflops_per_device"] = tflop / seconds
                line |= {} if self.peak is None else {"share_of_peak": tflop / seconds / self.peak}
        self._last = step, now
        self._write(step, line)
        return line

    def look(self, step: int, see: Callable[[], tuple[UInt8[np.ndarray, "height width 3"] | None, Mapping[str, float]]]) -> None:
        """Notes what is seen at a step: figures and, if any, a grid of samples, in FOLDER/samples too; not in the steps' time.

        Errors: `UserError` when the files cannot be written, and what `see` raises.
        """
        began = time.monotonic()
        grid, figures = see()
        if figures:
            self._write(step, {"step": step, **figures})
        if grid is not None:
            write_file(self.folder / "samples" / f"{step:06}.png", encode_png(grid))
            with _one_line(self.folder / "tensorboard"):
                if self._tells:
                    self._tell(step).picture(step, "samples", grid)
        if self._last is not None:
            self._last = self._last[0], self._last[1] + time.monotonic() - began

    def _write(self, step: int, line: dict[str, float]) -> None:
        with _one_line(self.file):
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "time": time.time()}) + "\n")
            if self._tells:
                self._tell(step).scalars(step, {name: value for name, value in line.items() if name != "step"})

    def _tell(self, step: int) -> Events:
        self._events = self._events or Events(self.folder / "tensorboard", step)
        return self._events


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}; free some space and resume.", "work") from None


def _version(library: str) -> str:
    """Of a library as installed; a checkout on the path is none."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"
