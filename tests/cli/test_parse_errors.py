"""A command line that cannot be read is one line, whatever box tyro draws around it."""

import dataclasses
from typing import Literal

import pytest

from e4t_jax.cli.parse_errors import line_of_box
from e4t_jax.cli.run import parse


@dataclasses.dataclass(frozen=True)
class Config:
    """A command."""

    out: str
    concept: str = ""
    images: tuple[str, ...] = ()
    steps: int = 5
    only: Literal["identity", "scene"] | None = None


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--out", "o", "--stepps", "3", "--x", "-1"],
            "--stepps and --x are unknown to this command; the nearest is --steps",
        ),
        (["--out", "o", "--step", "3"], "--step is unknown to this command; the nearest is --steps"),
        (["--Steps=3", "--outs"], "--Steps=3 and --outs are unknown to this command; the nearest are --steps and --out"),
        (["--otu", "o"], "--otu is unknown to this command; the nearest is --out"),
        (["--output-dir", "o"], "--output-dir is unknown to this command; the nearest is --out"),
        (["--out", "o", "word"], "'word' follows no option; write --images before it"),
        (["word"], "'word' follows no option; write --out before it"),
        (["word", "--out", "o", "--images", "a.png"], "'word' follows no option; write --images before it"),
        (["--out", "o", "venus.safetensors"], "'venus.safetensors' follows no option; write --concept before it"),
        ([], "--out must be given"),
        (["--out"], "Missing value for argument '--out'. Expected 1 values."),
        (["--out", "o", "--steps", "many"], "--steps: no int: 'many'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(arguments, line):
    with pytest.raises(SystemExit) as stop:
        parse(Config, arguments, "e4t command")
    assert str(stop.value) == f"Error: {line}; see --help."


def test_a_word_that_is_no_choice_is_told_the_choices():
    with pytest.raises(SystemExit, match=r"Error: invalid choice 'x' for argument '--only'.*'scene'[^\n]*; see --help\.$"):
        parse(Config, ["--out", "o", "--only", "x"], "e4t command")


def test_rules_of_hyphens_are_no_part_of_it():
    """As tyro draws its boxes where the terminal has no other lines."""
    rule = "-" * 80
    assert line_of_box(f"title\n{rule}\ninvalid choice 'x'\n{rule}") == "invalid choice 'x'"
