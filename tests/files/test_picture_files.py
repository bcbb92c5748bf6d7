"""Pictures and their masks told apart by name, and names that files may have."""

from pathlib import Path

import pytest

from e4t_jax.errors import UserError
from e4t_jax.files.picture_files import check_names, without_masks


def paths(*names):
    return [Path("pictures", name) for name in names]


def test_a_mask_beside_its_picture_is_no_picture():
    pictures, masks = without_masks(paths("ada.png", "ada.mask.png", "venus.jpg", "lone.mask.png"))
    assert pictures == paths("ada.png", "venus.jpg", "lone.mask.png") and masks == paths("ada.mask.png")


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "images: none; give one"), (paths("a.png", "a.jpg"), "images: two files have one name, and a; rename")],
)
def test_names_that_other_files_cannot_have_are_one_line(given, message):
    with pytest.raises(UserError, match=message):
        check_names(given, "images", empty="none; give one.", named="a")
