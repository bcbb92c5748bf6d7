"""What a user can mend: one line, no traceback."""

from __future__ import annotations

import re

_LONG_WORD = re.compile(r"(\S{200})\S{100,}(\S{50})")  # longer than most paths: its ends tell enough


class UserError(Exception):
    """A mistake the user can mend; one line that names the file or the argument and the mend.

    `argument` is the Python name of what was given wrongly ("word_rate"); the command line says its flag ("--word-rate").
    """

    def __init__(self, message: str, argument: str | None = None):
        # A file's name may hold line breaks, and what other libraries say of it too.
        message = " ".join("".join(letter if letter.isprintable() else " " for letter in message).split())
        message = _LONG_WORD.sub(r"\1…\2", message)
        super().__init__(f"{argument}: {message}" if argument else message)
        self.message = message
        self.argument = argument


class Stopped(Exception):
    """A training that was asked to stop, and did, after saving `step`."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}")
        self.step = step
