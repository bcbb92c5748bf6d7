"""What a command says on the error stream while it works: progress bars, and lines beside them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tqdm import tqdm

from e4t_jax.errors import UserError


def progress(items: Iterable, description: str, **options: Any) -> tqdm:
    """A progress bar with rate and time left, on the error stream."""
    return tqdm(items, desc=description, mininterval=1.0, dynamic_ncols=True, **options)


def steps_bar(description: str) -> Callable[[range], tqdm]:
    """What wraps the steps of a training, which may begin in the middle."""
    return lambda steps: progress(steps, description, total=steps.stop, initial=steps.start)


def say(line: str) -> None:
    """A line on the error stream, beside the progress bars."""
    tqdm.write(line, file=sys.stderr)


def raise_failures(failed: Mapping[str, UserError], count: int, what: str) -> None:
    """Says why some of `count` things ("pictures") failed, after all others are done.

    Errors: the one error there was, or a `UserError` that counts them.
    """
    if len(failed) == 1:
        raise next(iter(failed.values()))
    for name, error in failed.items():
        say(f"{name}: {error}")
    if failed:
        raise UserError(f"{len(failed)} of {count} {what} failed, for the reasons above; mend them, and --resume does the rest.")
