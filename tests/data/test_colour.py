"""Pictures with a colour profile are read as the sRGB pictures that they show."""

import io

import numpy as np
import pytest
from icc_profiles import SPACES, encoded_for, encoded_grey, grey_profile, inks_of, printer_profile, rgb_profile, shown_by, to_linear
from PIL import Image

from e4t_jax.data.images import read_image, to_uint8

SIZE = 24
ACROSS, DOWN = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
COLOURS = np.stack([60 + 7 * ACROSS, 80 + 5 * DOWN, 70 + 3 * (ACROSS + DOWN)], axis=-1).astype(np.uint8)
GREY = (40 + 8 * ACROSS + DOWN).astype(np.uint8)


def apart(source, expected):
    """The largest difference of what is read, of 255."""
    return np.abs(to_uint8(read_image(source, SIZE)[0]).astype(int) - np.asarray(expected, int)).max()


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_an_rgb_picture_with_a_profile_is_read_as_the_srgb_picture_it_shows(tmp_path, name, ending):
    """Within 2/255 of the sRGB original, 4 in ProPhoto; read as if sRGB, off by more than 8."""
    picture = Image.fromarray(encoded_for(name, COLOURS))
    lossless = {"webp": {"lossless": True}}.get(ending, {})
    picture.save(tmp_path / f"x.{ending}", icc_profile=rgb_profile(name), **lossless)
    assert apart(tmp_path / f"x.{ending}", COLOURS) <= (4 if name == "ProPhoto" else 2)
    if name != "sRGB":
        assert apart(picture, COLOURS) > 8


@pytest.mark.parametrize("name", SPACES)
def test_a_jpeg_with_a_profile_shows_what_its_numbers_mean(tmp_path, name):
    """Within 2/255 of the decoded numbers, taken to sRGB by NumPy: JPEG has rounded them before."""
    Image.fromarray(encoded_for(name, COLOURS)).save(tmp_path / "x.jpg", icc_profile=rgb_profile(name), quality=95)
    numbers = np.asarray(Image.open(tmp_path / "x.jpg"))
    assert apart(tmp_path / "x.jpg", shown_by(name, numbers)) <= 2


def test_a_picture_in_memory_brings_its_profile_too():
    picture = Image.fromarray(encoded_for("Adobe RGB", COLOURS))
    picture.info["icc_profile"] = rgb_profile("Adobe RGB")
    assert apart(picture, COLOURS) <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_pictures_have_profiles_of_their_own(tmp_path, mode):
    """A linear grey within 2/255 of sRGB's."""
    grey = encoded_grey(1.0, GREY)
    picture = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    picture.save(tmp_path / "x.png", icc_profile=grey_profile(1.0))
    assert apart(tmp_path / "x.png", np.repeat(GREY[..., None], 3, axis=2)) <= 2


def test_inks_are_read_by_the_table_of_their_printer(tmp_path):
    """Within 8/255; as Pillow has it without a profile, off by 30 and more."""
    picture = Image.fromarray(inks_of(COLOURS), "CMYK")
    picture.save(tmp_path / "x.tif", icc_profile=printer_profile())
    light = to_linear(COLOURS) * 2 / 3
    expected = np.round(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))
    # Perceptual, from a printer's profile: no black point is moved.
    assert apart(tmp_path / "x.tif", expected) <= 8
    assert apart(picture, expected) > 30


def test_alpha_and_palettes_keep_their_transparency(tmp_path):
    picture = Image.fromarray(encoded_for("P3", COLOURS)).convert("RGBA")
    alpha = Image.fromarray(np.where(ACROSS < 12, 0, 255).astype(np.uint8))
    picture.putalpha(alpha)
    picture.save(tmp_path / "x.png", icc_profile=rgb_profile("P3"))
    pixels, mask = read_image(tmp_path / "x.png", SIZE)
    assert (to_uint8(pixels)[:, :12] == 255).all() and (mask == (ACROSS >= 12)).all()
    assert np.abs(to_uint8(pixels)[:, 12:].astype(int) - COLOURS[:, 12:]).max() <= 2


@pytest.mark.parametrize("profile", [b"no profile", rgb_profile("P3")[:200], grey_profile(1.0), printer_profile()])
def test_a_profile_that_is_broken_or_of_other_colours_is_passed_over(tmp_path, profile):
    Image.fromarray(COLOURS).save(tmp_path / "x.png", icc_profile=profile)
    assert apart(tmp_path / "x.png", COLOURS) == 0


def test_srgb_pictures_stay_as_they_are(tmp_path):
    from PIL import ImageCms

    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "PNG", icc_profile=own)
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    assert apart(tmp_path / "x.png", COLOURS) == 0
