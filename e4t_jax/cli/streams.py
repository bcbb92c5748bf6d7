"""Standard output and error that nobody reads any more (`e4t --help | head -3`), or that cannot be written (`> /dev/full`)."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator

_READER_LEFT = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1  # what a shell says of a program that SIGPIPE ended


@contextlib.contextmanager
def ends_with_its_reader() -> Iterator[None]:
    """What is done within ends without a word once the reader of its output has left; output that cannot be written is a line."""
    try:
        try:
            yield
        finally:
            for stream in _streams():
                stream.flush()
    except BrokenPipeError:
        if not is_unread():
            raise
        _write_nowhere()
        sys.exit(_READER_LEFT)
    except OSError as error:
        _write_nowhere(sys.stdout)
        sys.exit(f"Error: the output cannot be written ({error.strerror or error}); check where it goes.")


def is_unread() -> bool:
    """Whether standard output or error is a pipe whose reader has left; a pipe to another process may break, too."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    for stream in _streams():
        poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _streams() -> list:
    """Those that are there, and are files: a test's are not."""
    found = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.fileno()
            found.append(stream)
    return found


def _write_nowhere(*only: object) -> None:
    """What is left in the streams goes nowhere: the interpreter writes it out as it ends, and would say that it cannot."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in _streams():
        if not only or stream in only:
            os.dup2(nowhere, stream.fileno())
