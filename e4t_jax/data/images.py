"""Reading users' pictures, whatever their format, and writing ours."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from e4t_jax.errors import UserError

_FEWEST_PIXELS = 8
_MOST_PIXELS = 200_000_000


def read_image(path: str | Path, size: int) -> tuple[Float[np.ndarray, "size size 3"], Float[np.ndarray, "size size"] | None]:
    """A picture in [-1, 1], centre-cropped to a square of `size`, and its mask in [0, 1] if it has one.

    The mask is NAME.mask.png beside the picture, or else an alpha channel that is not opaque throughout; transparent
    parts are laid on white. EXIF rotation is applied; palette, grey, CMYK and 16-bit pictures become RGB.

    Errors: `UserError`, one line that names the file, when it is missing, empty, damaged, no picture, or of a size out of reason.
    """
    path = Path(path)
    picture = _open(path)
    alpha = None
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
        alpha = None if alpha.getextrema() == (255, 255) else alpha
    sidecar = path.with_name(f"{path.stem}.mask.png")
    if sidecar.exists():
        alpha = _open(sidecar).convert("L")
        if alpha.size != picture.size:
            raise UserError(f"{sidecar} is {_sizes(alpha)}, {path} is {_sizes(picture)}; make them the same size.")
    pixels = np.asarray(_square(_to_rgb(picture), size), np.float32) / 127.5 - 1
    mask = None if alpha is None else np.asarray(_square(alpha, size), np.float32) / 255
    return pixels, mask


def _open(path: Path) -> Image.Image:
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the pictures in it one by one.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; copy it again.")
    try:
        picture = Image.open(path)
        if picture.width * picture.height > _MOST_PIXELS:
            raise UserError(f"{path} is {_sizes(picture)}; make it smaller than 200 megapixels.")
        picture.load()
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{path} is larger than 200 megapixels; make it smaller.") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path} is not a picture that Pillow can read; convert it to PNG or JPEG.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or export it again.") from None
    if min(picture.size) < _FEWEST_PIXELS:
        raise UserError(f"{path} is {_sizes(picture)}; a picture needs at least {_FEWEST_PIXELS} pixels a side.")
    return ImageOps.exif_transpose(picture)


def _sizes(picture: Image.Image) -> str:
    return f"{picture.width}×{picture.height} pixels"


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "I;16", "I;16B", "I;16L"):
        # Pillow would clip 16-bit values at 255 instead of scaling them.
        return Image.fromarray((np.asarray(picture, np.float32) / 257).round().astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


def _square(picture: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def fit_square(pixels: UInt8[np.ndarray, "height width *channels"], size: int) -> UInt8[np.ndarray, "size size *channels"]:
    """Centre crop to a square and resize (Lanczos), unless the picture has that size already."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(_square(Image.fromarray(pixels), size))


def to_uint8(images: Float[np.ndarray, "*batch h w 3"]) -> UInt8[np.ndarray, "*batch h w 3"]:
    """[-1, 1] to 0 … 255."""
    return np.asarray((np.clip(images, -1, 1) + 1) * 127.5).round().astype(np.uint8)


def encode_png(image: UInt8[np.ndarray, "h w *channels"]) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def picture_grid(
    rows: list[list[np.ndarray]], *, titles: list[str] | None = None, heading: str = "", scale: int = 1, margin: int = 4
) -> UInt8[np.ndarray, "height width 3"]:
    """Pictures of one size in rows and columns, with a `heading` above all and a title over each column where given."""
    side = rows[0][0].shape[0] * scale
    top = (28 if heading else 0) + (20 if titles else 0)
    width = len(rows[0]) * (side + margin) + margin
    canvas = Image.new("RGB", (width, top + len(rows) * (side + margin) + margin), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((margin, 6), heading, fill="black", font=ImageFont.load_default(17))
    for column, title in enumerate(titles or []):
        middle = margin + column * (side + margin) + side // 2
        pen.text((middle, top - 16), title, fill="dimgray", font=ImageFont.load_default(13), anchor="mt")
    for line, row in enumerate(rows):
        for column, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + column * (side + margin), top + margin + line * (side + margin)))
    return np.asarray(canvas)


def side_by_side(
    grids: list[UInt8[np.ndarray, "height width 3"]], *, columns: int = 2, gap: int = 24
) -> UInt8[np.ndarray, "height width 3"]:
    """Grids of one size beside and below one another, on white."""
    height, width, _ = grids[0].shape
    lines = -(-len(grids) // columns)
    canvas = np.full((lines * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, grid in enumerate(grids):
        y, x = gap + (index // columns) * (height + gap), gap + (index % columns) * (width + gap)
        canvas[y : y + height, x : x + width] = grid
    return canvas
