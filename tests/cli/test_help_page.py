"""The help page of every command: each option with what it takes, an example that can be called, groups where there are many."""

import shlex
from importlib import import_module
from typing import get_type_hints

import pytest

from e4t_jax.cli.help_page import help_page
from e4t_jax.cli.main import COMMANDS
from e4t_jax.cli.run import _field_names, check_ranges, parse


def config_of(command):
    main = import_module(f"e4t_jax.cli.{COMMANDS[command][0]}").main
    return get_type_hints(main, include_extras=True)["config"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_on_the_page_with_a_text_and_every_line_fits(command):
    kind = config_of(command)
    page = help_page(kind, f"e4t {command}")
    lines = page.splitlines()
    for name in _field_names(kind):
        flag = f"--{name.replace('_', '-')}"
        (row,) = (row for row, line in enumerate(lines) if line.startswith(f"  {flag}") and line[2 + len(flag)] in " ,")
        assert lines[row][28:].strip() or lines[row + 1].startswith(" " * 28), flag
    assert all(len(line) <= 100 or line.startswith("  e4t ") for line in lines)
    assert "None" not in page and "MISSING" not in page


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_every_command_is_one_that_it_takes(command):
    kind = config_of(command)
    program, name, *arguments = shlex.split(kind.example)
    assert (program, name) == ("e4t", command) and f"example:\n  {kind.example}\n" in help_page(kind, "e4t")
    check_ranges(parse(kind.with_defaults(arguments), arguments, f"e4t {command}"))


def test_the_options_of_pretraining_are_in_groups_and_show_the_presets_values():
    kind = config_of("pretrain")
    titles = ["example", "options", "data", "model", "learning", "memory and speed", "watching", "cluster"]
    for arguments, word, rate in (([], "creature", "0.0015"), (["--data", "folder:x", "--base", "y"], None, "1.6e-05")):
        page = help_page(kind.with_defaults(arguments), "e4t pretrain")
        assert [line[:-1] for line in page.splitlines() if line.endswith(":") and not line.startswith(" ")] == titles
        flat = " ".join(page.split())
        assert f"one token. ({'required' if word is None else f'default: {word}'})" in flat
        assert f"(warm-up, then cosine). (default: {rate})" in flat
        assert ("usage: e4t pretrain --out PATH --domain-token TEXT [OPTIONS]" in page) == (word is None)


def test_what_an_option_takes_is_said_plainly():
    page = help_page(config_of("export"), "e4t export")
    for line in (
        "--concept PATH ",
        "--format diffusers|lora|embedding",
        "--rank N ",
        "--error NUMBER ",
        "--add-token, --no-add-token",
    ):
        assert f"  {line}" in page
    assert "  --images PATH … " in help_page(config_of("tune"), "e4t tune")
    assert "(default: *s)" in page and "its mean along sampling trajectories. README.md" in " ".join(page.split())
