"""Reading users' pictures, whatever their format, and writing ours."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from e4t_jax.bases.image_encoders.bicubic import bicubic_weights
from e4t_jax.data.colour import open_profile, to_srgb
from e4t_jax.data.decoding import PictureLike, open_picture, sizes
from e4t_jax.errors import UserError

_MASK = ".mask.png"
_ORIGIN = "e4t origin"
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # modes


def read_image(
    source: PictureLike, size: int, *, use_mask: bool = True, mask: PictureLike | None = None, place: float | None = None
) -> tuple[Float[np.ndarray, "size size 3"], Float[np.ndarray, "size size"] | None]:
    """A picture in [-1, 1], cropped to a square of `size`, and its mask in [0, 1] if it has one.

    The mask is `mask`, or NAME.mask.png beside a file, or else an alpha channel that is not opaque throughout; transparent
    parts are laid on white. The square holds the middle of the picture, or of what the mask leaves, as far as there is room.
    Without mask, `place` says where along the longer side it lies, from 0 to 1.
    EXIF rotation is applied; palette, grey, CMYK, 16-bit and float pictures become RGB, and colours sRGB's by the profile.

    Errors: `UserError`, one line that names the file, when it is missing, empty, damaged, no picture, of a size or kind out of
    reason, or when its mask leaves nothing.
    """
    if isinstance(source, str | Path) and is_mask(source):
        raise UserError(f"{source} is a mask, by its name; give the picture that it belongs to, or rename it.")
    name = _name_of(source, "the picture")
    picture, alpha = _open_on_white(source, name)
    opaque = alpha.getextrema() == (255, 255)
    if not use_mask:
        if place is None:
            return _to_floats(_square(picture, size)), None
        width, height = picture.size
        side = min(width, height)
        centre = (side / 2 + place * (width - side), side / 2 + place * (height - side))
        return _to_floats(_square(picture, size, centre)), None
    if mask is None and isinstance(source, str | Path) and os.path.exists(mask_beside(source)):
        mask = mask_beside(source)
    if mask is not None:
        mask_name = _name_of(mask, f"the mask of {name}")
        alpha = _to_mask(open_picture(mask, mask_name), mask_name)
        if alpha.size != picture.size:
            raise UserError(f"{mask_name} is {sizes(alpha)}, {name} is {sizes(picture)}; make them the same size.")
    elif opaque:
        return _to_floats(_square(picture, size)), None
    box = alpha.point(lambda value: 255 * (value >= 128)).getbbox()
    if box is None:
        raise UserError(f"The mask of {name} leaves nothing of the picture: it must be white, or opaque, where the concept is.")
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    covered = np.asarray(_square(alpha, size, centre), np.float32) / 255
    if covered.max() < 0.5:
        raise UserError(f"The mask of {name} leaves nothing at {size}×{size} pixels; crop the picture to the concept.")
    return _to_floats(_square(picture, size, centre)), covered


def read_whole(source: PictureLike, size: int) -> Float[np.ndarray, "size size 3"]:
    """A whole picture squashed to a square, nothing cropped, as the public PyTorch code shows one to CLIP: about [-1, 1].

    Bicubic with aligned corners and without antialiasing, from all its pixels; what that overshoots is kept.

    Errors: `UserError` as `read_image`.
    """
    pixels = np.asarray(_open_on_white(source, _name_of(source, "the picture"))[0])
    rows, columns = (bicubic_weights(length, size) for length in pixels.shape[:2])
    # A new pixel is a sum of 16 old ones: of a large picture, most rows and columns are in none.
    used_rows, used_columns = (np.flatnonzero(weights.any(axis=0)) for weights in (rows, columns))
    used = np.asarray(pixels[np.ix_(used_rows, used_columns)], np.float32) / 127.5 - 1
    return np.einsum("yh,xw,hwc->yxc", rows[:, used_rows], columns[:, used_columns], used, optimize=True)


def is_mask(path: str | Path) -> bool:
    """Whether a file is a mask by its name, and no picture of its own."""
    return Path(path).name.lower().endswith(_MASK)


def mask_beside(path: str | Path) -> Path:
    """Where the mask of a picture file lies, if it has one."""
    return Path(path).with_name(f"{Path(path).stem}{_MASK}")


def _name_of(source: PictureLike, otherwise: str) -> str:
    return str(source) if isinstance(source, str | Path) else otherwise


def _open_on_white(source: PictureLike, name: str) -> tuple[Image.Image, Image.Image]:
    """A picture as RGB, laid on white where it is transparent, and its opacity."""
    rgba = _to_rgba(open_picture(source, name), name)
    alpha = rgba.getchannel("A")
    # Laid on white only where there is something to lay: it rounds.
    if alpha.getextrema() == (255, 255):
        return rgba.convert("RGB"), alpha
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), alpha


def _to_rgba(picture: Image.Image, name: str) -> Image.Image:
    """A picture of any mode as RGBA in sRGB: opaque where it tells of no transparency.

    Errors: `UserError` for a mode whose colours are not known.
    """
    profile = open_profile(picture.info.get("icc_profile"))
    if profile is None:
        return _without_profile(picture, name)
    if picture.mode in ("CMYK", "LAB"):
        same = picture.mode == profile.mode
        return to_srgb(picture, profile).convert("RGBA") if same else _without_profile(picture, name)
    rgba = _without_profile(picture, name)
    # A grey picture may come with a profile of RGB.
    if profile.mode == "RGB":
        colours = rgba.convert("RGB")
    elif profile.mode == "L" and picture.mode in _GREY:
        colours = rgba.getchannel("R")
    else:
        return rgba
    made = to_srgb(colours, profile)
    made.putalpha(rgba.getchannel("A"))
    return made


def _without_profile(picture: Image.Image, name: str) -> Image.Image:
    """A picture of any mode as RGBA, by Pillow's own rules."""
    if picture.mode.startswith(("I", "F")):
        return _deep_to_rgba(picture, name)
    # What Pillow turns into RGBA only by way of another mode.
    for mode, by_way_of in (("La", "LA"), ("RGBX", "RGB"), ("HSV", "RGB"), ("YCbCr", "RGB"), ("CMYK", "RGB")):
        if picture.mode == mode:
            picture = picture.convert(by_way_of)
    if picture.mode == "LAB":
        picture = _lab_to_rgb(picture)
    try:
        return picture.convert("RGBA")
    except ValueError:
        raise UserError(f"{name} is of Pillow's mode {picture.mode}, which is not supported; convert it to RGB.") from None


def _deep_to_rgba(picture: Image.Image, name: str) -> Image.Image:
    """A grey picture of more than 8 bits, scaled by the range that its numbers have; Pillow would cut them off at 255."""
    values = np.asarray(picture, np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise UserError(f"{name} holds numbers that are no brightness (negative or not finite); convert it to 8 bits.")
    most = values.max()
    if picture.mode.startswith("I;16"):
        scale = 257.0
    elif picture.mode == "F" and most <= 1:
        scale = 1 / 255
    elif most <= 255:
        scale = 1.0
    elif most <= 65535:
        scale = 257.0
    else:
        raise UserError(f"{name} holds numbers up to {most:g}, of a range that is not known; convert it to 8 bits.")
    grey = Image.fromarray((values / scale).round().astype(np.uint8)).convert("RGBA")
    transparent = picture.info.get("transparency")  # the one value that stands for nothing
    if isinstance(transparent, int | float):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _lab_to_rgb(picture: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    turned = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB", flags=ImageCms.Flags.NOOPTIMIZE)
    assert turned is not None  # only in place is nothing returned
    return turned


def _to_mask(picture: Image.Image, name: str) -> Image.Image:
    """The brightness of a mask of any mode; what is transparent is black."""
    rgba = _without_profile(picture, name)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba).convert("L")


def _to_floats(picture: Image.Image) -> Float[np.ndarray, "h w 3"]:
    return np.asarray(picture, np.float32) / 127.5 - 1


def _square(picture: Image.Image, size: int, centre: tuple[float, float] | None = None) -> Image.Image:
    """The largest square around `centre` (in pixels; the middle where not given) that the picture has room for, resized."""
    if centre is None:
        return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    width, height = picture.size
    side = min(width, height)
    left, top = (min(max(middle - side / 2, 0), whole - side) for middle, whole in zip(centre, (width, height), strict=True))
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def to_uint8(images: Float[np.ndarray, "*batch h w 3"]) -> UInt8[np.ndarray, "*batch h w 3"]:
    """[-1, 1] to 0 … 255."""
    return np.asarray((np.clip(images, -1, 1) + 1) * 127.5).round().astype(np.uint8)


def encode_png(image: UInt8[np.ndarray, "h w *channels"], origin: str = "", *, texts: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a PNG file; what is said of it by name in `texts`, and `origin`, which `png_origin` reads, are kept in it."""
    buffer, kept = io.BytesIO(), PngInfo()
    for name, text in {**(texts or {}), **({_ORIGIN: origin} if origin else {})}.items():
        # Of other letters than Latin-1's, an international text, as the format has it; what no encoding holds is spelled out.
        kept.add_text(name, text.encode("utf-8", "backslashreplace").decode())
    Image.fromarray(image).save(buffer, "PNG", pnginfo=kept)
    return buffer.getvalue()


def png_origin(path: Path) -> str | None:
    """The `origin` of a PNG file that is whole, by its checksums."""
    try:
        with Image.open(path) as picture:
            picture.verify()
            return picture.info.get(_ORIGIN)
    except (OSError, SyntaxError, ValueError):  # all of them Pillow's words for damage
        return None
