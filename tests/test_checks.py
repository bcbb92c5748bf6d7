"""What an argument may be is said beside it, for the command line and Python alike."""

import dataclasses
import importlib
import math
import pkgutil
from typing import Annotated, Any, Literal, get_args, get_type_hints

import jax.numpy as jnp
import numpy as np
import pytest

import e4t_jax
from e4t_jax.checks import (
    GUIDANCE,
    SCALE,
    Between,
    Count,
    SamplingSteps,
    Seed,
    TuningSteps,
    Whole,
    bounds,
    check_range,
    check_ranges,
)
from e4t_jax.cli import base as train_base
from e4t_jax.cli.run import run
from e4t_jax.errors import UserError


def settings_of_the_package():
    """Every dataclass whose name ends in Settings, every command's options, and the dataclasses among their fields."""
    found = {}
    for module in pkgutil.walk_packages(e4t_jax.__path__, "e4t_jax."):
        if module.name.endswith("__main__"):
            continue
        for name, kind in vars(importlib.import_module(module.name)).items():
            options = module.name.startswith("e4t_jax.cli.") and name == "Config"
            if dataclasses.is_dataclass(kind) and (name.endswith("Settings") or options):
                found[f"{kind.__module__}.{name}"] = kind
    for kind in list(found.values()):
        for hint in get_type_hints(kind).values():
            if dataclasses.is_dataclass(hint):
                found[f"{hint.__module__}.{hint.__name__}"] = hint
    return found


def parts_of(hint):
    """An annotation and all that it is made of."""
    return [hint, *(one for part in get_args(hint) for one in parts_of(part))]


SETTINGS = settings_of_the_package()
NUMBERS = [
    pytest.param(kind, name, hint, id=f"{kind.__module__.removeprefix('e4t_jax.')}.{kind.__name__}.{name}")
    for kind in SETTINGS.values()
    for name, hint in get_type_hints(kind, include_extras=True).items()
    if {int, float} & {part for part in parts_of(hint) if isinstance(part, type)}
]


def given(kind, **changes):
    """Settings with these fields and the others' defaults, however few of them there are; of no type but their own."""
    settings = object.__new__(kind)
    for field in dataclasses.fields(kind):
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        object.__setattr__(settings, field.name, changes.get(field.name, None if value is dataclasses.MISSING else value))
    return settings


def test_the_settings_are_found():
    names = {name.rpartition(".")[2] for name in SETTINGS}
    assert {"DomainSettings", "PretrainSettings", "CacheSettings", "TuneSettings", "SampleSettings"} <= names
    assert {"BaseSettings", "JudgeSettings", "Processes"} <= names
    assert len(NUMBERS) > 50


@pytest.mark.parametrize(("kind", "name", "hint"), NUMBERS)
def test_every_number_has_bounds_and_is_held_to_them(kind, name, hint):
    (within,) = bounds(hint)
    assert isinstance(within, Whole) == (int in parts_of(hint)) and math.isfinite(within.low) and math.isfinite(within.high)
    check_ranges(given(kind, **{name: within.high}))
    for value in (within.low - 1, within.high * 1.01 + 1, math.nan):
        with pytest.raises(UserError, match=rf"^{name}: .* is out of range; give .* at most") as error:
            check_ranges(given(kind, **{name: value}))
        assert error.value.argument == name


@pytest.mark.parametrize("within", [GUIDANCE, SCALE, *(next(bounds(kind)) for kind in (Seed, Count, TuningSteps, SamplingSteps))])
def test_the_ends_are_in_and_what_is_beyond_is_out(within):
    low, whole = within.low + (1e-6 if within.open_low else 0), isinstance(within, Whole)
    for value in (low, within.high, np.float64(low), np.int64(within.high) if whole else np.float32(within.high)):
        check_range("number", type(value)(value), within)
    outside = [within.low - 1, within.high * 1.01 + 1, math.nan, math.inf, -math.inf, np.float32("nan"), 10**400, -(10**5000)]
    for value in [*outside, *([within.low] if within.open_low else []), *([within.low + 0.5] if whole else [])]:
        with pytest.raises(UserError, match=r"^number: .*; give") as error:
            check_range("number", value, within)
        assert error.value.argument == "number" and len(str(error.value)) < 200


@pytest.mark.parametrize("value", [None, "many", (1, 2), True, jnp.asarray(-1)])
def test_what_is_no_number_of_python_passes(value):
    """An argument of another kind has a check of its own, and a traced array no value yet."""
    check_range("concepts", value, Whole(1, 2))


@dataclasses.dataclass
class Inner:
    steps: SamplingSteps | Any = 1
    kind: Literal["one", "two"] = "one"


@dataclasses.dataclass
class Outer:
    inner: Inner
    steps: TuningSteps = 0
    seed: Seed | Any = 0
    share: Annotated[float, Between(0, 1)] | None = None
    sizes: tuple[Count, ...] = ()


def test_settings_are_checked_with_those_within_them():
    check_ranges(Outer(Inner(), share=1.0, sizes=(1, 2)))
    for settings, said in (
        (Outer(Inner(steps=0)), "steps: 0 is out of range; give 1 or more and at most 10000"),
        (Outer(Inner(steps=1.5)), "steps: 1.5 is no whole number; give 1 or more"),
        (Outer(Inner(), steps=-1), "steps: -1 is out of range; give 0 or more"),
        (Outer(Inner(), seed=2**32), "seed: 4294967296 is out of range"),
        (Outer(Inner(), share=1.5), "share: 1.5 is out of range; give 0 or more and at most 1"),
        (Outer(Inner(), sizes=(1, 0)), "sizes: 0 is out of range; give 1 or more and at most 1000000000"),
        (Outer(Inner(kind="three")), "kind: 'three' is unknown; choose one of one, two"),
    ):
        with pytest.raises(UserError, match=f"^{said}"):
            check_ranges(settings)


@pytest.mark.parametrize("flag", ["--autoencoder-batch", "--contrast-batch", "--batch-size"])
@pytest.mark.parametrize("value", ["-5", "0"])
def test_a_batch_of_no_pictures_ends_in_one_line(flag, value, tmp_path):
    with pytest.raises(SystemExit) as end:
        run(train_base.main, ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), flag, value])
    assert end.value.code == f"Error: {flag}: {value} is out of range; give 1 or more and at most 1000000."
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line_whatever_it_says_again():
    """File names with line breaks, words of thousands of letters, other libraries' boxes."""
    said = str(UserError("a\nb\r\tc\0d\u2028e " + "x" * 5000 + " is no\n\n  file", "images"))
    assert said.startswith("images: a b c d e xxx") and said.endswith("xxx is no file")
    assert len(said) < 400 and len(said.splitlines()) == 1
