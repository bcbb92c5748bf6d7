"""Pictures of users as Pillow has them: decoded, turned upright, of a size within reason.

What does not concern the pixels refuses no picture: of EXIF the orientation alone is read, of PNG's chunks those that the pixels
depend on, and a JPEG whose end is missing is read where all of its pixels are there. The content decides on the format.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from e4t_jax.errors import UserError, reason_of

_FEWEST_PIXELS = 8
_MOST_PIXELS = 170_000_000  # Pillow itself refuses a little more
_WIDEST = 100  # times as long as it is wide
_LONGEST_REASON = 80  # characters of what another library says

PictureLike = str | Path | Image.Image | np.ndarray  # a file, a Pillow picture, or its numbers: uint8, or floats in [0, 1]

_PNG, _JPEG, _JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd9"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")  # what the pixels of a PNG follow from
_FEWEST_TRANSPARENT = {0: 2, 2: 6, 3: 1}  # bytes of a PNG's tRNS, by its type of colour
_LARGEST_PROFILE = 2**25  # bytes
_FIRST_KIBIBYTES = 2**16  # in which a JPEG has to begin
_ORIENTATION, _SHORT = 0x0112, 3
# EXIF's orientation -> what turns the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(source: PictureLike, name: str) -> Image.Image:
    """A picture that is decoded, turned as its EXIF says, and of a size within reason; a profile lies in `info["icc_profile"]`.

    Errors: `UserError`, one line that names it, when it is missing, empty, damaged, no picture, or of a size out of reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked below, and of odd metadata
            picture = _from_file(Path(source), name) if isinstance(source, str | Path) else _from_memory(source)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{name} is larger than {_MOST_PIXELS // 10**6} megapixels; make it smaller.") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is not a picture that Pillow can read; convert it to PNG or JPEG.") from None
    except FileNotFoundError:
        raise UserError(f"{name} does not exist; check the path.") from None
    except PermissionError:
        raise UserError(f"{name} may not be read; change its permissions.") from None
    except Exception as error:  # Pillow's many readers raise whatever the damage makes them raise
        reason = reason_of(error, _LONGEST_REASON)
        raise UserError(f"{name} is damaged or cannot be read ({reason}); copy or export it again.") from None
    if min(picture.size) < _FEWEST_PIXELS:
        raise UserError(f"{name} is {sizes(picture)}; a picture needs at least {_FEWEST_PIXELS} pixels a side.")
    if max(picture.size) > _WIDEST * min(picture.size):
        raise UserError(f"{name} is {sizes(picture)}, too narrow to crop a square from; crop it yourself.")
    return picture


def sizes(picture: Image.Image) -> str:
    """A picture's width and height in words."""
    return f"{picture.width}×{picture.height} pixels"


def _from_file(path: Path, name: str) -> Image.Image:
    if path.is_dir():
        raise UserError(f"{name} is a folder; give the pictures in it one by one.")
    content = path.read_bytes()
    if not content:
        raise UserError(f"{name} is empty; copy it again.")
    if content.startswith(_PNG):
        content, profile = _png_of_pixels(content)
        picture = _decoded(Image.open(io.BytesIO(content)), name)
        return _upright(picture, _profiled(picture, profile))
    start = content.find(_JPEG, 0, _FIRST_KIBIBYTES)
    try:
        with contextlib.suppress(Image.UnidentifiedImageError):
            picture = Image.open(io.BytesIO(content))
            return _upright(_decoded(picture, name), picture.info)
        if start < 0:
            raise Image.UnidentifiedImageError
        picture = Image.open(io.BytesIO(content[start:]))
        return _upright(_decoded(picture, name), picture.info)
    except OSError:
        if start < 0:
            raise
        return _jpeg_without_end(content[start:], name)


def _decoded(picture: Image.Image, name: str) -> Image.Image:
    if picture.width * picture.height > _MOST_PIXELS:
        raise UserError(f"{name} is {sizes(picture)}; make it smaller than {_MOST_PIXELS // 10**6} megapixels.")
    picture.load()
    return picture


def _from_memory(source: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(source, Image.Image):
        picture = _decoded(source, "the picture")
        return _upright(picture, picture.info)
    array = np.asarray(source)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise UserError(f"A picture of shape {array.shape} is none; give [height, width, 3].")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise UserError("A picture as an array must hold uint8, or floats from 0 to 1.")
        array = (array * 255).round().astype(np.uint8)
    return Image.fromarray(array)


def _png_of_pixels(content: bytes) -> tuple[bytes, dict[str, bytes]]:
    """A PNG of the chunks that its pixels follow from, their checksums verified; its profile and EXIF apart.

    Errors: `ValueError` for a checksum that is wrong.
    """
    kept, apart, kind_of_colour = [_PNG], {}, -1
    for kind, data, is_whole in _chunks(content):
        if kind in _PNG_PIXELS:
            if not is_whole:
                raise ValueError(f"broken PNG file (chunk {kind.decode()})")
            if kind == b"IHDR" and len(data) > 9:
                kind_of_colour = data[9]
            if kind != b"tRNS" or len(data) >= _FEWEST_TRANSPARENT.get(kind_of_colour, 1 << 31):
                kept.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
        elif kind == b"iCCP":
            with contextlib.suppress(zlib.error, IndexError):
                packed = data[data.index(0) + 2 :] if 0 in data else b""
                apart["icc_profile"] = zlib.decompressobj().decompress(packed, _LARGEST_PROFILE)
        elif kind == b"eXIf":
            apart["exif"] = data
    return b"".join(kept), apart


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """(kind, data, whether the checksum holds) of a PNG's chunks, as far as they go."""
    at = len(_PNG)
    while at + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        data, checksum = content[at + 8 : at + 8 + length], content[at + 8 + length : at + 12 + length]
        yield kind, data, checksum == struct.pack(">I", zlib.crc32(kind + data))
        if kind == b"IEND":
            return
        at += 12 + length


def _profiled(picture: Image.Image, apart: dict[str, bytes]) -> dict:
    picture.info.update(apart)
    return picture.info


def _jpeg_without_end(content: bytes, name: str) -> Image.Image:
    """A JPEG whose end is missing, where all of its pixels are there.

    Where some are not, the decoder would make them up of whatever follows: two endings then give two pictures.

    Errors: `OSError` where pixels are missing.
    """
    filler = bytes(np.random.default_rng(0).integers(0, 255, _FIRST_KIBIBYTES, np.uint8))  # without 255: no marker is in it
    content = content.removesuffix(b"\xff")
    first, other = (_decoded(Image.open(io.BytesIO(content + end)), name) for end in (_JPEG_END, filler + _JPEG_END))
    if first.tobytes() != other.tobytes():
        raise OSError("its last pixels are missing")
    return _upright(first, first.info)


def _upright(picture: Image.Image, info: dict) -> Image.Image:
    """The picture turned as its EXIF says; the profile stays with it."""
    orientation = _orientation(info["exif"]) if isinstance(info.get("exif"), bytes) else None
    if orientation is None:
        with contextlib.suppress(Exception):  # whatever other metadata makes Pillow raise
            orientation = picture.getexif().get(_ORIENTATION)
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return picture
    turned = picture.transpose(turn)
    turned.info = {key: value for key, value in picture.info.items() if key != "exif"}
    return turned


def _orientation(exif: bytes) -> int | None:
    """The orientation in a block of EXIF, whatever else is in it; None where it has none."""
    exif = exif.removeprefix(b"Exif\x00\x00")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    with contextlib.suppress(struct.error):
        if order is None:
            return None
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(count):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, at + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if kind == _SHORT else None
    return None
