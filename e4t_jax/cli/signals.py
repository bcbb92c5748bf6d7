"""SIGTERM, a cluster's request to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stop_on_request() -> Iterator[Callable[[], bool]]:
    """Yields what tells whether SIGTERM, a cluster's request to end, came meanwhile; a second one ends the process at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # no other may say how signals are handled
        yield asked.is_set
        return

    def note(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
