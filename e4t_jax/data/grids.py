"""Pictures laid out in rows and columns, to be looked at."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_LINE = 16  # pixels from one line of text to the next
_LONGEST = 6  # lines of a title or a label
_LABELS = 140  # pixels a label is wide at most


def picture_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    heading: str = "",
    side: int | None = None,
    margin: int = 4,
) -> UInt8[np.ndarray, "height width 3"]:
    """Pictures in rows and columns, with a `heading` above all, a title over each column and a label before each row where given.

    Args:
        rows: Square pictures, uint8 `[side, side, 3]`, as many in each row; None leaves its place white.
        titles: A text over each column, in as many lines as it takes.
        labels: A text before each row, too.
        heading: A line above all.
        side: Pixels a side that each picture takes, magnified without blurring; its own where not given.
        margin: Pixels between pictures.

    Errors: none.
    """
    side = side or next(len(picture) for row in rows for picture in row if picture is not None)
    font = ImageFont.load_default(13)
    lines = [_wrapped(title, side, font) for title in titles or []]
    names = [_wrapped(label, _LABELS, font) for label in labels or []]
    left = max((round(font.getlength(line)) + margin for name in names for line in name), default=0)
    top = (28 if heading else 0) + (4 + _LINE * max(map(len, lines)) if lines else 0)
    width = left + len(rows[0]) * (side + margin) + margin
    canvas = Image.new("RGB", (width, top + len(rows) * (side + margin) + margin), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((margin, 6), heading, fill="black", font=ImageFont.load_default(17))
    for column, title in enumerate(lines):
        middle = left + margin + column * (side + margin) + side // 2
        _write(pen, title, (middle, top - _LINE * len(title)), font=font, anchor="mt")
    for line, row in enumerate(rows):
        y = top + margin + line * (side + margin)
        if names:
            _write(pen, names[line], (margin, y + (side - _LINE * len(names[line])) // 2), font=font, anchor="lt")
        for column, picture in enumerate(row):
            if picture is None:
                continue
            # Magnified, a pixel stays a square; made smaller, none is left out.
            how = Image.Resampling.NEAREST if len(picture) <= side else Image.Resampling.LANCZOS
            canvas.paste(Image.fromarray(picture).resize((side, side), how), (left + margin + column * (side + margin), y))
    return np.asarray(canvas)


def _write(pen: ImageDraw.ImageDraw, lines: list[str], at: tuple[int, int], *, font: Font, anchor: str) -> None:
    for index, line in enumerate(lines):
        pen.text((at[0], at[1] + _LINE * index), line, fill="dimgray", font=font, anchor=anchor)


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """A text in lines of at most `width` pixels, cut off after a few; control signs, which a font draws as boxes, are left out."""
    text = "".join(sign if unicodedata.category(sign)[0] != "C" else " " for sign in text)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        while word:  # one that is too long for a line is broken
            length = next((n for n in range(len(word), 1, -1) if font.getlength(word[:n]) <= width), 1)
            lines[-1], word = word[:length], word[length:]
            lines += [""] if word else []
    return lines if len(lines) <= _LONGEST else [*lines[: _LONGEST - 1], "…"]


def side_by_side(
    grids: list[UInt8[np.ndarray, "height width 3"]], *, columns: int = 2, gap: int = 24
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Grids of one size beside and below one another, on white."""
    height, width, _ = grids[0].shape
    lines = -(-len(grids) // columns)
    canvas = np.full((lines * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, grid in enumerate(grids):
        y, x = gap + (index // columns) * (height + gap), gap + (index % columns) * (width + gap)
        canvas[y : y + height, x : x + width] = grid
    return canvas
