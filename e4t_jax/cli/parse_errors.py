"""A command line that tyro cannot read, as one line.

Words that are unknown come from tyro as a list (`return_unknown_args`). All else it prints in a box; the events that the box is
made from are private (`tyro._errors`: "may change or be removed in any release"), so what is read here is the box.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_BORDER = "╭╮╰╯│─ "
_LONGEST = 300


def unknown_words(words: Sequence[str]) -> str:
    """The flags among some words that no option takes, as a message; a value that follows one is no mistake of its own."""
    flags = [word for word in words if word.startswith("-") and not word[1:2].isdigit()] or [repr(words[0])]
    return f"{' and '.join(flags)} {'is' if len(flags) == 1 else 'are'} unknown to this command"


def line_of_box(box: str) -> str:
    """The message in tyro's box: a title, then sections between rules; the first is the mistake, others are help."""
    message, *others = _sections(box) or [[]]
    if message and message[0].startswith("Missing from"):
        for heading, *words in others:
            if heading.startswith("Unrecognized"):
                return unknown_words(words)
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
