"""Pictures of users: every format is read rightly, and every mistake is named."""

import numpy as np
import pytest
from PIL import Image

from e4t_jax.data.grids import picture_grid
from e4t_jax.data.images import encode_png, png_origin, read_image, to_uint8
from e4t_jax.errors import UserError


def colours(path, size=16):
    pixels, mask = read_image(path, size)
    return to_uint8(pixels), mask


def test_formats_of_one_colour_read_as_that_colour(tmp_path):
    """RGB, palette and CMYK within 2/255; 16-bit grey scaled, not clipped."""
    red = Image.new("RGB", (40, 30), (200, 40, 60))
    red.save(tmp_path / "rgb.png")
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    red.convert("CMYK").save(tmp_path / "cmyk.tif")
    for name in ("rgb.png", "palette.png", "cmyk.tif"):
        pixels, mask = colours(tmp_path / name)
        assert mask is None
        assert np.abs(pixels.astype(int) - [200, 40, 60]).max() <= 2, name
    Image.fromarray(np.full((20, 20), 0x8080, np.uint16)).save(tmp_path / "deep.png")
    assert np.abs(colours(tmp_path / "deep.png")[0].astype(int) - 128).max() <= 1


def test_alpha_becomes_white_ground_and_mask(tmp_path):
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[:, 8:] = (0, 0, 255, 255)
    Image.fromarray(picture).save(tmp_path / "half.png")
    pixels, mask = colours(tmp_path / "half.png")
    assert (pixels[8, 2] == 255).all() and (pixels[8, 13] == (0, 0, 255)).all()
    assert mask[8, 2] == 0 and mask[8, 13] == 1


def test_sidecar_mask_is_read(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "ada.png")
    Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, axis=1).repeat(16, axis=0)).save(tmp_path / "ada.mask.png")
    mask = colours(tmp_path / "ada.png")[1]
    assert mask[3, 2] == 0 and mask[3, 13] == 1


def test_exif_rotation_is_applied(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    pixels, _ = colours(tmp_path / "turned.png")
    assert pixels[2].max() == 0 and pixels[13].min() == 255


def test_bad_pictures_are_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("no picture at all")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    (tmp_path / "cut.png").write_bytes(encode_png(noise)[:3000])
    said = {
        "missing.png": "does not exist",
        "empty.png": "is empty",
        "words.png": "is not a picture",
        "dot.png": "at least 8 pixels",
        "cut.png": "is damaged",
        ".": "is a folder",
    }
    for name, words in said.items():
        with pytest.raises(UserError, match=words) as error:
            read_image(tmp_path / name, 16)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)


def test_grid_holds_every_picture():
    tiles = [[np.full((4, 4, 3), 10 * row + column, np.uint8) for column in range(3)] for row in range(2)]
    grid = picture_grid(tiles, margin=2)
    assert grid.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    assert (grid[2 + 6 : 6 + 6, 2 + 12 : 6 + 12] == 12).all()


def test_a_png_keeps_its_origin_while_it_is_whole(tmp_path):
    path = tmp_path / "drawn.png"
    content = encode_png(np.zeros((8, 8, 3), np.uint8), "of a seed")
    path.write_bytes(content)
    assert png_origin(path) == "of a seed"
    path.write_bytes(content[:-30])
    assert png_origin(path) is None
    path.write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8)))
    assert png_origin(path) is None and png_origin(tmp_path / "nowhere.png") is None
