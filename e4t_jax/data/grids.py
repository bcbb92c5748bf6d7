"""Pictures laid out in rows and columns, to be looked at."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont


def picture_grid(
    rows: list[list[np.ndarray]],
    *,
    titles: list[str] | None = None,
    labels: list[str] | None = None,
    heading: str = "",
    scale: int = 1,
    margin: int = 4,
) -> UInt8[np.ndarray, "height width 3"]:
    """Pictures of one size in rows and columns, with a `heading` above all, a title over each column and a label over each row,
    where given."""
    side = rows[0][0].shape[0] * scale
    top, label = (28 if heading else 0) + (20 if titles else 0), 22 if labels else 0
    width, height = len(rows[0]) * (side + margin) + margin, side + margin + label
    canvas = Image.new("RGB", (width, top + len(rows) * height + margin), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((margin, 6), heading, fill="black", font=ImageFont.load_default(17))
    for column, title in enumerate(titles or []):
        middle = margin + column * (side + margin) + side // 2
        pen.text((middle, top - 16), title, fill="dimgray", font=ImageFont.load_default(13), anchor="mt")
    for line, row in enumerate(rows):
        y = top + margin + line * height
        if labels:
            pen.text((margin, y + 3), labels[line], fill="black", font=ImageFont.load_default(13))
        for column, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + column * (side + margin), y + label))
    return np.asarray(canvas)


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
