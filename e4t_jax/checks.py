"""What numbers an argument may be, beside the field that holds it, for the command line and Python alike.

    steps: Count = 2400
    guidance: Guidance | None = None
    moment: Annotated[float, Between(0, 3600)] = 0.01

`check_ranges` reads the bounds out of a dataclass's annotations; a number that is no field is checked by `check_range`, with the
same constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from e4t_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Between:
    """low ≤ value ≤ high; with `open_low`, low < value."""

    low: float
    high: float
    open_low: bool = False

    def __contains__(self, value: Any) -> bool:
        # No NaN is within any bounds, and no infinity within these.
        return bool(self.low <= value <= self.high and not (self.open_low and value == self.low))

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        return f"{low} and at most {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Whole(Between):
    """The whole numbers from low to high."""

    def __contains__(self, value: Any) -> bool:
        return super().__contains__(value) and not value % 1

    def __str__(self) -> str:
        return f"{self.low:g} or more and at most {int(self.high)}"


_MANY = 10**9
WEIGHT = Between(0, 1e6)
SCALE = Between(0, 1000, open_low=True)
GUIDANCE = Between(-100, 1000)

Seed = Annotated[int, Whole(0, 2**32 - 1)]
Count = Annotated[int, Whole(1, _MANY)]
CountOrNone = Annotated[int, Whole(0, _MANY)]
BatchSize = Annotated[int, Whole(1, 1_000_000)]
TuningSteps = Annotated[int, Whole(0, 1_000_000)]  # 0: the encoder alone
SamplingSteps = Annotated[int, Whole(1, 10_000)]
Concepts = Annotated[int, Whole(1, 1_000_000)]
Workers = Annotated[int, Whole(0, 1024)]
Rate = Annotated[float, Between(0, 1e6)]  # of learning
Weight = Annotated[float, WEIGHT]  # of a term of the loss
Guidance = Annotated[float, GUIDANCE]

_LONGEST = 40  # digits of a number that is repeated in a message


def check_range(name: str, value: Any, within: Between) -> None:
    """Errors: `UserError` naming the argument when a number is not finite or out of its bounds; other values pass."""
    if not _is_number(value) or value in within:
        return
    # Python itself refuses to write out an integer of thousands of digits.
    number = "the number" if isinstance(value, int) and abs(value) > 10**_LONGEST else str(value)
    inside = isinstance(within, Whole) and value in Between(within.low, within.high)
    what = "no whole number" if inside else "out of range"
    raise UserError(f"{number} is {what}; give {within}.", name)


def check_ranges(settings: Any) -> None:
    """`check_range` for every number among the fields of a dataclass, and of the dataclasses among them; of a field that is one of
    some words (`Literal`), that it is.

    Errors: `UserError` naming the first field that is none of what its annotation allows.
    """
    kinds = get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_ranges(value)
            continue
        words = get_args(kinds[field.name]) if get_origin(kinds[field.name]) is Literal else ()
        if words and value not in words:
            raise UserError(f"{str(value)[:60]!r} is unknown; choose one of {', '.join(words)}.", field.name)
        for within in bounds(kinds[field.name]):
            for one in value if isinstance(value, tuple | list) else (value,):
                check_range(field.name, one, within)


def bounds(kind: Any) -> Iterator[Between]:
    """The bounds in an annotation, within unions and tuples too: `Count | None`, `tuple[Count, ...]`."""
    if get_origin(kind) is Annotated:
        yield from (one for one in kind.__metadata__ if isinstance(one, Between))
        yield from bounds(kind.__origin__)
    else:
        for part in get_args(kind):
            yield from bounds(part)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
