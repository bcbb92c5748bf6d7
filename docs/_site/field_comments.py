"""Comments that describe a field or a table are its description on the API pages, as a string beneath it would be.

A field of a class is described by the comment on its line, a table of a module by the comment above it. A table's own lines, where
there are many, stay in the source.
"""

import io
import tokenize

import griffe

_LONGEST = 3  # lines of a value that a page shows


def comment_on(lines: list[str]) -> str:
    """The comment that ends a definition, or nothing."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline))
    except (tokenize.TokenError, IndentationError):
        return ""
    return next((token.string.lstrip("# ") for token in reversed(tokens) if token.type == tokenize.COMMENT), "")


def comment_above(lines: list[str]) -> str:
    """The lines of comment that the last of `lines` belongs to, or nothing."""
    first = len(lines)
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return " ".join(line.lstrip("# ") for line in lines[first:])


class FieldComments(griffe.Extension):
    """Reads the comments; mkdocstrings is told of this class by mkdocs.yml."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        if attr.parent is None or not attr.lineno or not attr.endlineno:
            return
        lines = attr.lines_collection[attr.filepath]
        if attr.parent.is_module and attr.endlineno - attr.lineno >= _LONGEST:
            attr.value = "..."
        if attr.docstring is None:
            if attr.parent.is_class:
                text = comment_on([line.strip() for line in lines[attr.lineno - 1 : attr.endlineno]])
            else:
                text = comment_above(lines[: attr.lineno - 1]) or comment_on(lines[attr.lineno - 1 : attr.endlineno])
            if text:
                attr.docstring = griffe.Docstring(f"{text[0].upper()}{text[1:]}", lineno=attr.lineno, parent=attr)
