"""What does not concern the pixels refuses no picture, and missing pixels always do."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from e4t_jax.data.images import read_image, to_uint8
from e4t_jax.errors import UserError

SIZE = 24
PIXELS = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)


def pixels_of(path):
    return to_uint8(read_image(path, SIZE)[0])


def png(*extra, pixels=PIXELS, mode=None):
    """A PNG with more chunks before its pixels."""
    buffer = io.BytesIO()
    (Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)).save(buffer, "PNG")
    content = buffer.getvalue()
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in extra
    )
    return content[:33] + chunks + content[33:]


def jpeg(**options):
    buffer = io.BytesIO()
    smooth = np.repeat(np.repeat(PIXELS[::4, ::4], 16, axis=0), 16, axis=1)
    Image.fromarray(smooth).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


LONG = zlib.compress(bytes(3 << 20))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"workflow\0\0" + LONG),
        (b"iTXt", b"workflow\0\1\0\0\0" + LONG),
        (b"iCCP", b"profile\0\0" + LONG),
        (b"iCCP", b"profile"),
        (b"pHYs", b"\0"),
        (b"cHRM", b"\0\0"),
        (b"sRGB", b""),
        (b"gAMA", b"\0"),
        (b"tRNS", b"\0"),
        (b"eXIf", b"\0"),
        (b"abCd", b"whatever"),
    ],
    ids=lambda chunk: f"{chunk[0].decode()}-{len(chunk[1])}",
)
def test_chunks_that_do_not_concern_the_pixels_refuse_no_png(tmp_path, chunk):
    (tmp_path / "x.png").write_bytes(png(chunk))
    np.testing.assert_array_equal(pixels_of(tmp_path / "x.png"), PIXELS)


def test_a_png_whose_pixels_have_another_checksum_is_damaged(tmp_path):
    content = bytearray(png())
    content[content.index(b"IDAT") + 20] ^= 1
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png is damaged"):
        pixels_of(tmp_path / "x.png")


def exif(*entries, order="<"):
    """EXIF of (tag, kind, count, four bytes)."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return b"Exif\0\0" + head + b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)


TURNS = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}
ODD = [
    (0x010E, 2, 0xFFFFFF00, b"\xff\xff\xff\x7f"),  # a text of four gigabytes
    (0x011A, 5, 1, b"\xff\xff\xff\x7f"),  # a fraction beyond the end
    (0x9286, 77, 3, b"abcd"),  # of no kind there is
    (0x8769, 4, 1, b"\x08\0\0\0"),  # a directory that is itself
]


@pytest.mark.parametrize("odd", [None, *range(len(ODD))])
@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("order", "<>")
def test_a_picture_is_turned_whatever_else_its_exif_holds(tmp_path, orientation, odd, order):
    own = (0x0112, 3, 1, struct.pack(f"{order}HH", orientation, 0))
    block = exif(*([ODD[odd]] if odd is not None else []), own, order=order)
    for name, save in {"x.webp": {"lossless": True}, "x.png": {}}.items():
        Image.fromarray(PIXELS).save(tmp_path / name, exif=block, **save)
        np.testing.assert_array_equal(pixels_of(tmp_path / name), TURNS[orientation](PIXELS))
    (tmp_path / "x.jpg").write_bytes(jpeg(exif=block))
    plain = np.asarray(Image.open(io.BytesIO(jpeg())))
    turned = read_image(tmp_path / "x.jpg", 96)[0]
    np.testing.assert_array_equal(to_uint8(turned), TURNS[orientation](plain))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_is_read_where_all_pixels_are_there(tmp_path, progressive):
    content = jpeg(progressive=progressive)
    whole = np.asarray(Image.open(io.BytesIO(content)))
    for name, changed in {
        "end": content[:-2],
        "half": content[:-1],
        "start": b"\n" + content,
        "both": b"\0" + content[:-2],
    }.items():
        (tmp_path / f"{name}.jpg").write_bytes(changed)
        np.testing.assert_array_equal(to_uint8(read_image(tmp_path / f"{name}.jpg", 96)[0]), whole)
    for missing in (6, 40, 200, len(content) // 2):
        (tmp_path / "cut.jpg").write_bytes(content[:-missing])
        with pytest.raises(UserError, match=r"cut\.jpg is damaged"):
            read_image(tmp_path / "cut.jpg", 96)


def test_the_content_decides_on_the_format(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    np.testing.assert_array_equal(pixels_of(tmp_path / "x.jpg"), PIXELS)
