"""What a user can mend: one line, no traceback."""

from __future__ import annotations

import re
from typing import Any

_LONG_WORD = re.compile(r"(\S{200})\S{100,}(\S{50})")  # longer than most paths: its ends tell enough


class UserError(Exception):
    """A mistake the user can mend; one line that names the file or the argument and the mend.

    Args:
        message: What is wrong and what to do, as a sentence; line breaks and very long words are taken out.
        argument: The Python name of what was given wrongly ("word_rate"); the command line says its flag ("--word-rate").
    """

    def __init__(self, message: str, argument: str | None = None):
        # A file's name may hold line breaks, and what other libraries say of it too.
        message = " ".join("".join(letter if letter.isprintable() else " " for letter in message).split())
        message = _LONG_WORD.sub(r"\1…\2", message)
        super().__init__(f"{argument}: {message}" if argument else message)
        self.message = message
        self.argument = argument


def reason_of(error: Exception, most: int = 120) -> str:
    """What another library says of an error, as part of a line: its first line, or its kind where it says nothing."""
    return str(error).splitlines()[0][:most] if str(error) else type(error).__name__


def shortened(value: Any, most: int = 60) -> str:
    """A value as a message says it again: its first characters, where it is long."""
    if isinstance(value, str):
        return repr(value if len(value) <= most else f"{value[:most]}…")
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number"
    return text if len(text) <= most else f"{text[:most]}…"


class Stopped(Exception):
    """A training that was asked to stop, and did, after saving `step`."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}")
        self.step = step
