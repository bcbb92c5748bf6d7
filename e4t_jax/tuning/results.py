"""What comes of one thing among many: a result, or an error of its own; one failure does not stop the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from e4t_jax.errors import UserError

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Outcome(Generic[Result]):
    """Of the thing called `name`: its result, or why there is none; neither where it was there before."""

    name: str
    result: Result | None = None
    error: UserError | None = None
    origin: str = ""  # a checksum of all that the result follows from
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of it, what can be said in plain data

    def unwrap(self) -> Result:
        """The result. Errors: the `UserError` that there is instead."""
        if self.error is not None:
            raise self.error
        assert self.result is not None, f"{self.name} was there before"
        return self.result


class Outcomes(Iterator[Outcome[Result]]):
    """Outcomes as they come, and how many there will be: a progress bar knows the time left."""

    def __init__(self, count: int, outcomes: Iterator[Outcome[Result]]):
        self.count, self.outcomes = count, outcomes

    def __len__(self) -> int:
        return self.count

    def __next__(self) -> Outcome[Result]:
        return next(self.outcomes)
