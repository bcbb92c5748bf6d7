"""Views of one picture: itself first, flips, and crops that lose at most a tenth of a side, with its mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.data.augment import make_views

SIZE, COUNT = 40, 6


@pytest.fixture(scope="module")
def views():
    """Of a picture whose red is its column, green its row, and whose mask is its left half."""
    column, row = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))
    image = jnp.asarray(np.stack([column, row, np.zeros_like(row)], -1), jnp.float32)
    mask = jnp.asarray(column < 0, jnp.float32)
    return image, mask, *make_views(image, mask, jax.random.key(0), COUNT)


def test_the_first_is_the_picture_itself(views):
    image, mask, images, masks = views
    assert images.shape == (COUNT, SIZE, SIZE, 3) and masks.shape == (COUNT, SIZE, SIZE)
    np.testing.assert_allclose(images[0], image, atol=1e-6)
    np.testing.assert_allclose(masks[0], mask, atol=1e-6)


def test_every_second_is_flipped_and_each_loses_at_most_a_tenth_of_a_side(views):
    """Columns rise or fall along a row, rows always rise; what is left of 2 from edge to edge is 1.8 or more, less half a pixel."""
    _, _, images, _ = views
    for index, image in enumerate(np.asarray(images)):
        across, down = image[SIZE // 2, :, 0], image[:, SIZE // 2, 1]
        across = -across if index % 2 else across
        for line in (across, down):
            assert (np.diff(line) >= -1e-5).all()
            assert 1.75 < line[-1] - line[0] <= 2 + 1e-5
    assert len({float(image[0, 0, 1]) for image in images}) > 1  # other crops than the first


def test_a_mask_goes_with_its_picture(views):
    """Wherever a view shows a column of the left half, its mask says so, the pixels at the border apart."""
    _, _, images, masks = views
    away = np.abs(np.asarray(images[..., 0])) > 0.06
    assert away.mean() > 0.9
    np.testing.assert_allclose(np.asarray(masks)[away], (np.asarray(images[..., 0]) < 0)[away], atol=1e-5)
