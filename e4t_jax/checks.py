"""What numbers an argument may be, in one table, for the command line and Python alike.

An argument of one name means one thing wherever it is taken: its range is here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from e4t_jax.errors import UserError

_LARGEST_SEED = 2**32 - 1
_MANY = 10**9


@dataclasses.dataclass(frozen=True)
class Range:
    """low ≤ value ≤ high; with `open_low`, low < value."""

    low: float
    high: float
    open_low: bool = False
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        # No NaN is within any bounds, and no infinity within these.
        inside = self.low <= value <= self.high
        return bool(inside and not (self.open_low and value == self.low) and not (self.whole and value % 1))

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        return f"{low} and at most {int(self.high) if self.whole else format(self.high, 'g')}"


def _whole(low: int, high: int) -> Range:
    return Range(low, high, whole=True)


_COUNT, _COUNT_OR_NONE = _whole(1, _MANY), _whole(0, _MANY)
RANGES: dict[str, Range] = {
    "seed": _whole(0, _LARGEST_SEED),
    "batch_size": _whole(1, 1_000_000),
    "per_device_batch": _whole(1, 10_000),
    "learning_rate": Range(0, 1e6),
    "word_rate": Range(0, 1e6),
    "regularisation": Range(0, 1e6),
    "guidance": Range(-100, 1000),
    "scale": Range(0, 1000, open_low=True),
    "sampling_steps": _whole(1, 10_000),
    "rank": _COUNT,  # beyond a kernel's smaller side it gains nothing, and is not taken
    "error": Range(0, 1),
    "concepts": _whole(1, 1_000_000),
    "prompts": _whole(1, 1000),
    "checkpoint_every": _COUNT,
    "watch_every": _COUNT,
    "sample_every": _COUNT_OR_NONE,
    "held_out": _COUNT_OR_NONE,
    "fsdp": _COUNT,
    "accumulate": _COUNT,
    "views": _whole(1, 1000),
    "max_batch": _whole(1, 65_536),
    "max_wait": Range(0, 3600),
    "workers": _whole(0, 1024),
    "pictures": _COUNT,
    "identities": _COUNT,
    "scenes": _COUNT,
    "creatures": _COUNT,
    "autoencoder_steps": _COUNT_OR_NONE,
    "denoiser_steps": _COUNT_OR_NONE,
    "contrast_steps": _COUNT_OR_NONE,
    "identity_steps": _COUNT_OR_NONE,
    "scene_steps": _COUNT_OR_NONE,
    "attribute_steps": _COUNT_OR_NONE,
}
# "steps" is of a tuning (0: the encoder alone), of a sampler, or of a training, which takes one at least: the settings say of what.
_STEPS = {"tuning": _whole(0, 1_000_000), "sampling": _whole(1, 10_000), "training": _COUNT}
_LONGEST = 40  # of a number that is said again


def check_range(name: str, value: Any, within: Range | None = None) -> None:
    """Errors: `UserError` naming the argument when a number is not finite or out of its range; other values pass."""
    within = within or RANGES.get(name)
    if within is not None and _is_number(value):
        _check_number(name, value, within)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _check_number(name: str, value: Any, within: Range) -> None:
    if value not in within:
        # Python itself refuses to write out an integer of thousands of digits.
        number = "the number" if isinstance(value, int) and abs(value) > 10**_LONGEST else str(value)
        what = "no whole number" if within.whole and value % 1 and value in Range(within.low, within.high) else "out of range"
        raise UserError(f"{number} is {what}; give {within}.", name)


def check_ranges(settings: Any) -> None:
    """`check_range` for every number among the fields of a dataclass, and of the dataclasses among them; of a field that is one of
    some words (`Literal`), that it is.

    `STEPS_OF`, where a dataclass has it, says whose its `steps` are: "sampling" or "training"; those of a tuning where not.
    """
    kinds = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        words = get_args(kinds[field.name]) if get_origin(kinds[field.name]) is Literal else ()
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_ranges(value)
        elif words and value not in words:
            raise UserError(f"{str(value)[:60]!r} is unknown; choose one of {', '.join(words)}.", field.name)
        elif field.name == "steps":
            check_range("steps", value, _STEPS[getattr(settings, "STEPS_OF", "tuning")])
        else:
            check_range(field.name, value)
