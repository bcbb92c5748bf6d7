"""What an argument may be is said in one table, for the command line and Python alike."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.checks import RANGES, check_range, check_ranges
from e4t_jax.errors import UserError


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_are_in_and_what_is_beyond_is_out(name):
    within = RANGES[name]
    low = within.low + (1e-6 if within.open_low else 0)
    for value in (low, within.high, np.float64(low), np.float32(within.high) if not within.whole else np.int64(within.high)):
        check_range(name, type(value)(value))
    outside = [within.low - 1, within.high * 1.01 + 1, math.nan, math.inf, -math.inf, np.float32("nan"), 10**400, -(10**5000)]
    for value in [*outside, *([within.low] if within.open_low else []), *([within.low + 0.5] if within.whole else [])]:
        with pytest.raises(UserError, match=f"^{name}: .*; give") as error:
            check_range(name, value)
        assert error.value.argument == name and len(str(error.value)) < 200


@pytest.mark.parametrize("value", [None, "many", (1, 2), True, jnp.asarray(-1)])
def test_what_is_no_number_of_python_passes(value):
    """An argument of another kind has a check of its own, and a traced array no value yet."""
    check_range("concepts", value)


@dataclasses.dataclass
class Inner:
    STEPS_OF: ClassVar[str] = "sampling"
    steps: Any = 1
    kind: Literal["one", "two"] = "one"


@dataclasses.dataclass
class Outer:
    inner: Inner
    steps: int = 0
    seed: Any = 0


def test_settings_are_checked_with_those_within_them():
    check_ranges(Outer(Inner()))
    for settings, said in (
        (Outer(Inner(steps=0)), "steps: 0 is out of range; give 1 or more and at most 10000"),
        (Outer(Inner(steps=1.5)), "steps: 1.5 is no whole number; give 1 or more"),
        (Outer(Inner(), steps=-1), "steps: -1 is out of range; give 0 or more"),
        (Outer(Inner(), seed=2**32), "seed: 4294967296 is out of range"),
        (Outer(Inner(kind="three")), "kind: 'three' is unknown; choose one of one, two"),
    ):
        with pytest.raises(UserError, match=f"^{said}"):
            check_ranges(settings)


def test_an_error_is_one_line_whatever_it_says_again():
    """File names with line breaks, words of thousands of letters, other libraries' boxes."""
    said = str(UserError("a\nb\r\tc\0d\u2028e " + "x" * 5000 + " is no\n\n  file", "images"))
    assert said.startswith("images: a b c d e xxx") and said.endswith("xxx is no file")
    assert len(said) < 400 and len(said.splitlines()) == 1
