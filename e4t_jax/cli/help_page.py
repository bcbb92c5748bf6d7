"""What `e4t COMMAND --help` says: what the command does, an example, and its options in groups, out of its typed dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from e4t_jax.pretraining.settings import DomainSettings

_KINDS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}
_WIDEST = 100  # columns
_OWN = "options"  # the group of what belongs to no other
_SHARED = "memory and speed"  # what nearly all commands have
# In the order of the page; options that are named nowhere here come first.
_GROUPS = {
    "data": ("data", "held_out", "workers", "views", "kept", "mask"),
    "model": ("base", "image_encoder", "open_clip", *(field.name for field in dataclasses.fields(DomainSettings))),
    "learning": ("scope", "recipe", "also", "steps", "learning_rate", "word_rate", "regularisation", "batch_size", "seed"),
    _SHARED: ("dtype", "remat", "attention", "parallel", "fsdp", "accumulate", "cache"),
    "watching": ("checkpoint_every", "watch_every", "sample_every", "profile"),
    "cluster": ("coordinator", "num_processes", "process_id"),
}
_FEWEST = 12  # options that are worth groups


class Option(NamedTuple):
    """An option, as the page shows it."""

    name: str
    flag: str  # with what it takes
    text: str


def help_page(config_type: type, program: str) -> str:
    """The page of a command.

    Args:
        config_type: Its dataclass; the docstring says what it does, that of each field what the option means, `example` how it is
            called.
        program: How it is called: "e4t tune".

    Errors: none.
    """
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    options = list(_options(config_type))
    required = [option.flag for option in options if option.text.endswith("(required)")]
    usage = f"usage: {' '.join([program, *required, '[OPTIONS]'])}"
    parts = [usage, "\n".join(textwrap.wrap(" ".join(inspect.cleandoc(config_type.__doc__ or "").split()), width))]
    example = getattr(config_type, "example", None)
    if example:
        parts.append(f"example:\n  {example}")
    parts += [f"{title}:\n" + "\n".join(_lines(own, width)) for title, own in _grouped(options).items()]
    parts.append(f"  {'-h, --help':26}this page")
    return "\n\n".join(parts)


def _grouped(options: list[Option]) -> dict[str, list[Option]]:
    """The options by group; of few, all in one."""
    if len(options) < _FEWEST:
        return {_OWN: sorted(options, key=lambda option: option.name in _GROUPS[_SHARED])}
    home = {name: title for title, names in _GROUPS.items() for name in names}
    groups = {title: [one for one in options if home.get(one.name, _OWN) == title] for title in (_OWN, *_GROUPS)}
    return {title: own for title, own in groups.items() if own}


def _lines(options: list[Option], width: int) -> Iterator[str]:
    for option in options:
        text = textwrap.wrap(option.text, width - 28)
        if len(option.flag) < 25:
            yield f"  {option.flag:26}{text[0] if text else ''}"
            text = text[1:]
        else:
            yield f"  {option.flag}"
        yield from (" " * 28 + line for line in text)


def _options(config_type: type) -> Iterator[Option]:
    """The options of a dataclass; the fields of settings that it takes whole are its own."""
    hints, texts = get_type_hints(config_type, include_extras=True), _texts(config_type)
    for field in sorted(dataclasses.fields(config_type), key=lambda field: not _is_required(field)):
        kind = _bare(hints[field.name])
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            default = None if _is_required(field) else field.default
            yield from (_with_default(option, kind, default) for option in _options(kind))
            continue
        yield Option(field.name, _flag(field.name, kind), f"{texts.get(field.name, '')}{_default(field.default)}".strip())


def _with_default(option: Option, kind: type, whole: Any) -> Option:
    """An option of settings that come with values of their own, such as a preset's."""
    if whole is None:
        return option
    text = _texts(kind).get(option.name, "")
    return option._replace(text=f"{text}{_default(getattr(whole, option.name))}".strip())


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return " (required)"
    if value is None or value is False or value == ():
        return ""
    return f" (default: {'yes' if value is True else value})"


def _flag(name: str, kind: Any) -> str:
    """--name with what it takes: "--steps N", "--images PATH …", "--dtype auto|float32"."""
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        return f"{flag}, --no-{flag[2:]}"
    many = get_origin(kind) is tuple
    one = _bare(get_args(kind)[0]) if many else kind
    taken = "|".join(map(str, get_args(one))) if get_origin(one) is Literal else _KINDS.get(one, "TEXT")
    return f"{flag} {taken}{' …' if many else ''}"


def _bare(kind: Any) -> Any:
    """A type without annotations and without None among its alternatives."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    others = [one for one in get_args(kind) if one is not type(None)]
    if type(None) in get_args(kind) and len(others) == 1:
        return _bare(others[0])
    return kind


def _texts(config_type: type) -> dict[str, str]:
    """The string below each field, in the class that declares it or those it inherits from."""
    found: dict[str, str] = {}
    for kind in reversed(config_type.__mro__):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        except (OSError, TypeError):  # made by no source, as that of a preset
            continue
        for field, text in zip(tree.body, tree.body[1:], strict=False):  # type: ignore[attr-defined]
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found
