"""What numbers an argument may be, in one table, for the command line and Python alike.

An argument of one name means one thing wherever it is taken: its range is here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from e4t_jax.errors import UserError

_LARGEST_SEED = 2**32 - 1
_MANY = 10**9


@dataclasses.dataclass(frozen=True)
class Range:
    """low ≤ value ≤ high; with `open_low`, low < value."""

    low: float
    high: float
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and not (self.open_low and value == self.low)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        return low if self.high >= _MANY else f"{low} and at most {self.high:g}"


_COUNT, _COUNT_OR_NONE = Range(1, _MANY), Range(0, _MANY)
RANGES: dict[str, Range] = {
    "seed": Range(0, _LARGEST_SEED),
    "batch_size": Range(1, 1_000_000),
    "learning_rate": Range(0, 1e6),
    "word_rate": Range(0, 1e6),
    "regularisation": Range(0, 1e6),
    "guidance": Range(-100, 1000),
    "scale": Range(0, 1000, open_low=True),
    "sampling_steps": Range(1, 10_000),
    "rank": _COUNT,  # beyond a kernel's smaller side it gains nothing, and is not taken
    "error": Range(0, 1),
    "concepts": Range(1, 1_000_000),
    "prompts": Range(1, 1000),
    "checkpoint_every": _COUNT,
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
# "steps" is of tuning (0: the encoder alone), of a sampler, or of a training, which takes one at least.
STEPS = {"tuning": Range(0, 1_000_000), "sampling": Range(1, 10_000), "training": _COUNT}


def check_range(name: str, value: Any, within: Range | None = None) -> None:
    """Errors: `UserError` naming the argument when a number is not finite or out of its range; other values pass."""
    within = within or RANGES.get(name)
    if within is None or isinstance(value, bool | jax.Array) or not isinstance(value, int | float):
        return
    if value not in within:
        raise UserError(f"{value} is out of range; give {within}.", name)


def check_ranges(settings: Any, steps: str = "tuning") -> None:
    """`check_range` for every number among the fields of a dataclass; `steps` says whose steps its own are."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == "steps":
            check_range("steps", value, STEPS[steps])
        else:
            check_range(field.name, value)
