"""Picture files: which of some are masks, and what is named after them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from e4t_jax.data.images import is_mask, mask_beside
from e4t_jax.errors import UserError


def without_masks(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(pictures, masks): a shell's `*.png` catches NAME.mask.png together with the picture it belongs to.

    A mask without its picture among `paths` stays with the pictures, for reading it to say what it is.
    """
    beside = {mask_beside(path) for path in paths if not is_mask(path)}
    return [path for path in paths if path not in beside], [path for path in paths if path in beside]


def check_names(paths: Sequence[Path], argument: str, *, empty: str, named: str) -> None:
    """Makes sure that other files can be named after these.

    Errors: `UserError` on `argument` when there is no file (`empty` says what to give), or two have one name (`named` says what is
    named after it).
    """
    if not paths:
        raise UserError(empty, argument)
    if len({path.stem for path in paths}) < len(paths):
        raise UserError(f"two files have one name, and {named}; rename one.", argument)
