"""What a run is doing, in files that other programs read: a line of JSON at every look at it, and what the run is."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from e4t_jax.errors import UserError
from e4t_jax.storage import to_json, write_file

_LIBRARIES = ("e4t-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Watch:
    """Appends to FOLDER/metrics.jsonl: step, figures, seconds a step, images a second, seconds left, time since 1970.

    Of two lines of one step the later one holds: the run went on from before it. The first line after a start has no speed, for
    compiling is not training.

    Errors: `UserError` when the folder cannot be written.
    """

    def __init__(self, folder: Path, batch_size: int, steps: int, facts: Mapping[str, Any]):
        self.file = folder / "metrics.jsonl"
        self.batch_size = batch_size
        self.steps = steps
        self._last: tuple[int, float] | None = None
        versions = {name: _version(name) for name in _LIBRARIES}
        machine = {"python": platform.python_version(), "devices": jax.devices()[0].device_kind, "processes": jax.process_count()}
        write_file(folder / "run.json", to_json({"settings": facts, "versions": versions, "machine": machine}))

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Notes the figures of a step.

        Errors: `UserError` when the file cannot be written.
        """
        now = time.monotonic()
        line: dict[str, Any] = {"step": step, **figures}
        if self._last is not None:
            seconds = (now - self._last[1]) / (step - self._last[0])
            speed = {"seconds_per_step": seconds, "images_per_second": self.batch_size / seconds}
            line |= {**speed, "seconds_left": seconds * (self.steps - step)}
        self._last = step, now
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "time": time.time()}) + "\n")
        except OSError as error:
            raise UserError(f"Cannot write {self.file}: {error.strerror}; free some space and resume.", "work") from None


def _version(library: str) -> str:
    """Of a library as installed; a checkout on the path is none."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"
