"""A command line that tyro cannot read, as one line.

Words that are unknown come from tyro as a list (`return_unknown_args`). All else it prints in a box; the events that the box is
made from are private (`tyro._errors`: "may change or be removed in any release"), so what is read here is the box.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

_BORDER = "╭╮╰╯│─ "
_LONGEST = 300
# Words whose form tells which option they belong to.
_FORMS = (
    (re.compile(r"^(folder|cache|tfds):"), "--data"),
    (re.compile(r"\.safetensors$"), "--concepts"),
    (re.compile(r"\.safetensors$"), "--concept"),
)


class Option(NamedTuple):
    """An option of a command, as far as a mistake may have meant it."""

    flag: str
    takes_many: bool = False  # words, one after the other
    lacks: bool = False  # it must be given, and was not


def unknown_words(words: Sequence[str], options: Sequence[Option] = ()) -> str:
    """What to say of words that no option takes: each unknown flag with the nearest that there is, or else the first word with the
    option that it may belong to. A value that follows an unknown flag is no mistake of its own."""
    flags = [word for word in words if word.startswith("-") and not word[1:2].isdigit()]
    known = [option.flag for option in options]
    if flags:
        near = list(dict.fromkeys(one for flag in flags if (one := _nearest(flag, known))))
        nearest = f"; the nearest {'is' if len(near) == 1 else 'are'} {' and '.join(near)}" if near else ""
        return f"{' and '.join(flags)} {'is' if len(flags) == 1 else 'are'} unknown to this command{nearest}"
    meant = next((flag for form, flag in _FORMS if form.search(words[0]) and flag in known), None)
    meant = meant or next((one.flag for one in options if one.lacks), None)
    meant = meant or next((one.flag for one in options if one.takes_many), None)
    return f"{words[0]!r} follows no option" + (f"; write {meant} before it" if meant else "")


def _nearest(flag: str, known: Sequence[str]) -> str | None:
    """The known flag that is most alike, by its letters or by its beginning."""
    name = flag.partition("=")[0].lower().replace("_", "-")
    near = get_close_matches(name, known, 1, 0.7)
    begun = [one for one in known if len(name) > 3 and (one.startswith(name) or name.startswith(one))]
    return near[0] if near else max(begun, key=len, default=None)


def line_of_box(box: str, options: Sequence[Option] = ()) -> str:
    """The message in tyro's box: a title, then sections between rules; the first is the mistake, others are help."""
    message, *others = _sections(box) or [[]]
    if message and message[0].startswith("Missing from"):
        for heading, *words in others:
            if heading.startswith("Unrecognized"):
                return unknown_words(words, options)
        flags = [line.split()[0] for line in message if line.startswith("--")]
        return f"{' and '.join(flags)} must be given"
    text = re.sub(r"invalid literal for (\w+)\(\)[^:]*: ", r"no \1: ", " ".join(message))
    return text.removeprefix("Error parsing ")[:_LONGEST] or "the command line cannot be read"


def _sections(box: str) -> list[list[str]]:
    """The lines of a box without its border and title; where a terminal has no other signs, its rules are of hyphens."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip(_BORDER)
        if text.strip("-"):
            sections[-1].append(text)
        elif sections[-1]:
            sections.append([])
    return [section for section in sections if section]
