"""Pictures and masks of every mode that Pillow has, and of every kind that is none."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from e4t_jax.data.images import encode_png, is_mask, mask_beside, read_image, to_uint8
from e4t_jax.errors import UserError

SIZE = 24
ACROSS, DOWN = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
COLOURS = np.stack([60 + 5 * ACROSS, 80 + 4 * DOWN, 70 + 2 * (ACROSS + DOWN)], axis=-1).astype(np.uint8)
GREY = (20 + 8 * ACROSS + DOWN).astype(np.uint8)
DEEP = GREY.astype(np.uint16) * 257
PROFILES = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")


def rgb():
    return Image.fromarray(COLOURS)


def grey():
    return Image.fromarray(GREY)


def deep(mode, kind):
    return Image.frombytes(mode, (SIZE, SIZE), DEEP.astype(kind).tobytes())


COLOURED = {
    "RGB": rgb,
    "RGBA": lambda: rgb().convert("RGBA"),
    "RGBa": lambda: rgb().convert("RGBA").convert("RGBa"),
    "RGBX": lambda: rgb().convert("RGBX"),
    "CMYK": lambda: rgb().convert("CMYK"),
    "YCbCr": lambda: rgb().convert("YCbCr"),
    "HSV": lambda: rgb().convert("HSV"),
    "LAB": lambda: ImageCms.profileToProfile(rgb(), *PROFILES, outputMode="LAB"),
    "P": lambda: rgb().quantize(256),
    "PA": lambda: rgb().quantize(256).convert("PA"),
}
GREYS = {
    "L": grey,
    "LA": lambda: grey().convert("LA"),
    "La": lambda: grey().convert("LA").convert("La"),
    "I": lambda: Image.fromarray(GREY.astype(np.int32)),
    "I;16": lambda: deep("I;16", "<u2"),
    "I;16B": lambda: deep("I;16B", ">u2"),
    "I;16L": lambda: deep("I;16L", "<u2"),
    "I;16N": lambda: deep("I;16N", "=u2"),
    "F": lambda: Image.fromarray(GREY.astype(np.float32) / 255),
}


def pixels_of(source, **options):
    pixels, mask = read_image(source, SIZE, **options)
    return to_uint8(pixels).astype(int), mask


def meaning_of(picture):
    """The colours that the numbers of a picture stand for: a mode may have rounded them."""
    if picture.mode != "LAB":
        return np.asarray(picture.convert("RGB")).astype(int)
    # CIE L*a*b* under D50 to sRGB, by the book.
    numbers = np.moveaxis(np.asarray(picture), -1, 0)
    lightness, a, b = numbers[0].astype(float), *numbers[1:].view(np.int8).astype(float)
    y = (lightness / 2.55 + 16) / 116
    cubes = np.stack([y + a / 500, y, y - b / 200], axis=-1)
    xyz = np.where(cubes > 6 / 29, cubes**3, 3 * (6 / 29) ** 2 * (cubes - 4 / 29)) * (0.9642, 1, 0.8249)
    to_rgb = [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    linear = (xyz @ np.transpose(to_rgb)).clip(0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


@pytest.mark.parametrize("mode", COLOURED)
def test_colours_of_every_mode(mode):
    """Within 2/255 of what the numbers of the picture mean, and no further from the true picture than the mode is."""
    picture = COLOURED[mode]()
    assert picture.mode == mode
    found, mask = pixels_of(picture)
    assert mask is None and np.abs(found - meaning_of(picture)).max() <= 2
    assert np.abs(found - COLOURS).mean() <= np.abs(meaning_of(picture) - COLOURS).mean() + 0.5
    assert np.abs(found - COLOURS).mean() < 4


@pytest.mark.parametrize("mode", GREYS)
def test_greys_of_every_mode(mode):
    picture = GREYS[mode]()
    assert picture.mode == mode
    found, mask = pixels_of(picture)
    assert mask is None and np.abs(found - GREY[..., None]).max() <= 1


def test_black_and_white():
    picture = grey().convert("1")
    assert (pixels_of(picture)[0] == np.asarray(picture)[..., None] * 255).all()


@pytest.mark.parametrize("most", [1, 255, 65535])
def test_float_pictures_are_scaled_by_their_range(most, tmp_path):
    """A TIFF of floats from 0 to 1 is no black picture."""
    values = GREY.astype(np.float32) / GREY.max() * most
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert np.abs(pixels_of(tmp_path / "float.tif")[0] - (values / most * 255)[..., None]).max() <= 1


@pytest.mark.parametrize("values", [GREY - 100.0, GREY * np.nan, GREY * 1e6, GREY * np.inf], ids=["negative", "nan", "huge", "inf"])
def test_numbers_that_are_no_brightness_are_refused(values, tmp_path):
    with np.errstate(invalid="ignore"):
        Image.fromarray(np.asarray(values, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float.tif holds numbers"):
        pixels_of(tmp_path / "float.tif")


def test_sixteen_bits_in_files_of_several_kinds(tmp_path):
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(DEEP).save(tmp_path / name)
        assert np.abs(pixels_of(tmp_path / name)[0] - GREY[..., None]).max() <= 1
    # One value of a 16-bit picture that stands for nothing, as PNG has it.
    Image.fromarray(DEEP).save(tmp_path / "hole.png", transparency=int(DEEP[3, 4]))
    found, mask = pixels_of(tmp_path / "hole.png")
    assert (found[3, 4] == 255).all() and mask[3, 4] == 0 and mask.mean() > 0.9


# masks ------------------------------------------------------------------------------------------------------------------

SHAPE = np.zeros((SIZE, SIZE), np.uint8)
SHAPE[4:20, 6:18] = 255


def mask_of(mode):
    plain = Image.fromarray(SHAPE)
    if mode == "LAB":
        return ImageCms.profileToProfile(plain.convert("RGB"), *PROFILES, outputMode="LAB")
    if mode.startswith("I;16"):
        return Image.frombytes(
            mode, plain.size, (SHAPE.astype(np.uint16) * 257).astype(">u2" if mode.endswith("B") else "<u2").tobytes()
        )
    if mode in ("La", "RGBa"):
        return plain.convert(mode.replace("a", "A")).convert(mode)
    if mode == "PA":
        return plain.convert("P").convert("PA")
    return plain.convert(mode)


MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "I;16B",
    "I;16L",
    "F",
]


@pytest.mark.parametrize("mode", MODES)
def test_masks_of_every_mode(mode):
    found = pixels_of(rgb(), mask=mask_of(mode))[1]
    assert np.abs(found * 255 - SHAPE).max() <= 2


@pytest.mark.parametrize("content", ["alpha", "float", "dark"])
def test_masks_in_files(content, tmp_path):
    rgb().save(tmp_path / "venus.png")
    assert mask_beside(tmp_path / "venus.png") == tmp_path / "venus.mask.png"
    layers = {"alpha": np.dstack([np.full((SIZE, SIZE, 3), 255, np.uint8), SHAPE]), "float": SHAPE, "dark": SHAPE // 3}
    Image.fromarray(layers[content]).save(tmp_path / "venus.mask.png")
    if content == "dark":
        with pytest.raises(UserError, match=r"The mask of .*venus.png leaves nothing of the picture"):
            pixels_of(tmp_path / "venus.png")
    else:
        np.testing.assert_allclose(pixels_of(tmp_path / "venus.png")[1], SHAPE / 255, atol=1e-2)
    assert pixels_of(tmp_path / "venus.png", use_mask=False)[1] is None


def test_a_mask_that_leaves_nothing_is_refused(tmp_path):
    """Black throughout, of another size, transparent throughout, or no picture: the file is named."""
    rgb().save(tmp_path / "venus.png")
    mask = tmp_path / "venus.mask.png"
    for write in (
        lambda: Image.new("L", (SIZE, SIZE)).save(mask),
        lambda: Image.new("L", (SIZE, SIZE + 1), 255).save(mask),
        lambda: Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0)).save(mask),
        lambda: mask.write_text("no picture"),
        lambda: mask.write_bytes(b""),
    ):
        write()
        with pytest.raises(UserError, match=r"venus\..*png") as error:
            pixels_of(tmp_path / "venus.png")
        assert len(str(error.value).splitlines()) == 1
    mask.unlink()
    Image.new("RGBA", (SIZE, SIZE)).save(tmp_path / "venus.png")
    with pytest.raises(UserError, match=r"The mask of .*venus.png leaves nothing of the picture"):
        pixels_of(tmp_path / "venus.png")


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_wide_picture_is_cropped_around_what_its_mask_leaves(tmp_path, at, upright):
    """3:1, the subject at either end or in the middle: all of it is in the square, and the mask lies on it."""
    picture, mask = np.full((40, 120, 3), 200, np.uint8), np.zeros((40, 120), np.uint8)
    first = int(120 * at) - 8
    picture[10:30, first : first + 16] = (220, 30, 40)
    mask[10:30, first : first + 16] = 255
    if upright:
        picture, mask = picture.swapaxes(0, 1), mask.T
    Image.fromarray(np.ascontiguousarray(picture)).save(tmp_path / "venus.png")
    Image.fromarray(np.ascontiguousarray(mask)).save(tmp_path / "venus.mask.png")
    pixels, found = read_image(tmp_path / "venus.png", 40)
    red = (to_uint8(pixels).astype(int) - (220, 30, 40) == 0).all(axis=-1)
    assert red.sum() == 20 * 16 and ((found > 0.5) == red).all()


def test_what_is_a_mask_by_name_is_no_picture(tmp_path):
    rgb().save(tmp_path / "venus.mask.png")
    assert is_mask(tmp_path / "venus.mask.png") and not is_mask(tmp_path / "venus.png")
    with pytest.raises(UserError, match=r"venus.mask.png is a mask, by its name"):
        pixels_of(tmp_path / "venus.mask.png")


# kinds of files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "memory"])
def test_every_exif_rotation_is_undone(turn, suffix, tmp_path):
    """The picture as the camera's owner saw it, whichever way it was stored."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that the tag stands for, undone
    stored = Image.fromarray(COLOURS).transpose(Image.Transpose(back[turn])) if turn > 1 else rgb()
    exif = Image.Exif()
    exif[0x0112] = turn
    file = io.BytesIO() if suffix == "memory" else tmp_path / f"turned.{suffix}"
    stored.save(
        file,
        format="PNG" if suffix == "memory" else None,
        exif=exif,
        **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}),
    )
    found = pixels_of(Image.open(file) if suffix == "memory" else file)[0]
    assert np.abs(found - COLOURS).max() <= (6 if suffix == "jpg" else 0)


def test_an_animation_is_its_first_picture(tmp_path):
    frames = [Image.new("P", (SIZE, SIZE)), Image.new("RGB", (SIZE, SIZE), (0, 0, 250))]
    frames[0].putpalette([200, 10, 20] * 256)
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.abs(pixels_of(tmp_path / "moving.gif")[0] - (200, 10, 20)).max() <= 2


@pytest.mark.compiles
def test_fifty_megapixels_are_read_and_more_than_the_limit_refused(tmp_path):
    Image.new("L", (8000, 6250), 77).save(tmp_path / "large.png", compress_level=1)
    assert (pixels_of(tmp_path / "large.png")[0] == 77).all()
    Image.new("1", (20_000, 9_000)).save(tmp_path / "huge.png")
    with pytest.raises(UserError, match=r"huge.png is .*megapixels"):
        pixels_of(tmp_path / "huge.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tif"])
def test_what_is_cut_off_is_told_and_never_half_a_picture(suffix, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    noise.save(tmp_path / f"whole.{suffix}")
    content, whole = (tmp_path / f"whole.{suffix}").read_bytes(), pixels_of(tmp_path / f"whole.{suffix}")[0]
    path = tmp_path / f"cut.{suffix}"
    for length in [0, 1, 8, 30, *range(100, len(content), len(content) // 15), len(content) - 1]:
        path.write_bytes(content[:length])
        try:
            found = pixels_of(path)[0]
        except UserError as error:
            assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
        else:
            assert (found == whole).all(), length


def test_a_flipped_bit_in_a_png_is_told_or_changes_nothing(tmp_path):
    content = encode_png(COLOURS)
    generator, told = np.random.default_rng(0), 0
    for _ in range(100):
        flipped = bytearray(content)
        flipped[generator.integers(len(content))] ^= 1 << generator.integers(8)
        (tmp_path / "flipped.png").write_bytes(flipped)
        try:
            found = pixels_of(tmp_path / "flipped.png")[0]
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / 'flipped.png'} ") and len(str(error).splitlines()) == 1
            told += 1
        else:
            assert (found == COLOURS).all()
    assert told > 90


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("zero.png", bytes(5000)),
        ("text.jpg", b"no picture at all\n" * 50),
        ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"><circle r="9"/></svg>'),
        ("page.pdf", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\nshowpage\n"),
        ("archive.png", b"PK\x03\x04" + bytes(300)),
        ("pickle.png", b"\x80\x04\x95\x00" + bytes(300)),
    ],
)
def test_what_is_no_picture_is_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        pixels_of(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("size", [(1, 1), (7, 400), (8, 900)])
def test_sizes_out_of_reason_are_one_line(size):
    with pytest.raises(UserError, match="the picture is"):
        pixels_of(Image.new("RGB", size))


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png", "", ".", "below/a/file.png", "line\nbreak.png"])
def test_names_that_lead_nowhere_are_one_line(name, tmp_path):
    with pytest.raises(UserError) as error:
        pixels_of(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 9, 3), np.uint8),
        np.zeros((9, 9, 2), np.uint8),
        np.zeros((9, 9, 3, 1), np.uint8),
        np.zeros(9, np.uint8),
        np.full((9, 9, 3), 1.5),
        np.full((9, 9, 3), np.nan),
        np.full((9, 9, 3), -0.1),
        np.zeros((9, 9, 3), np.int64),
        np.zeros((9, 9, 3), bool),
        np.zeros((9, 9, 3), complex),
        np.full((9, 9, 3), "a"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_that_are_no_picture_are_one_line(array):
    with pytest.raises(UserError, match="A picture"):
        pixels_of(array)


def test_arrays_that_are_pictures():
    for array in (COLOURS, COLOURS / 255, GREY, GREY[..., None], np.dstack([COLOURS, np.full_like(GREY, 255)])):
        truth = COLOURS if array.ndim == 3 and array.shape[2] > 1 else GREY[..., None]
        assert np.abs(pixels_of(array)[0] - truth).max() <= 1


def test_a_picture_that_is_opened_and_cannot_be_decoded_is_one_line():
    noise = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    opened = Image.open(io.BytesIO(encode_png(noise)[:300]))
    with pytest.raises(UserError, match="the picture is damaged or cannot be read"):
        pixels_of(opened)
