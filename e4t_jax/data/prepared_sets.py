"""Data sets that TFDS has prepared (`tfds:NAME`): found on the disk and opened; nothing is fetched, drawn or written here.

TFDS prepares TFRecord files where it is not told otherwise, which cannot be read in any order; `array_record` files can.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e4t_jax.errors import UserError, reason_of

_SPLIT = "train"
_FORMAT = "array_record"


def open_prepared(name: str, data_dir: str | Path) -> Any:
    """The split "train" of a data set: `len`, and rows by number.

    Args:
        name: As TFDS takes it: "oxford_flowers102", "name/config", "name:1.0.0".
        data_dir: Folder of prepared sets to look in first; then where TFDS itself keeps them (`~/tensorflow_datasets`, or
            `$TFDS_DATA_DIR`).

    Errors: `UserError` for a set that is not prepared, is in another format than array_record, or has no split "train".
    """
    import tensorflow_datasets as tfds

    folders = [str(Path(data_dir).absolute()), tfds.core.constants.get_default_data_dir()]
    try:
        found = {folder: builder for folder in folders if (builder := _find(name, folder)) is not None}
    except Exception as error:  # a name that it cannot read, files that it finds damaged: TFDS raises whatever it raises
        raise UserError(f"tfds:{name} cannot be opened in {data_dir} ({reason_of(error, 160)}); check the name.", "data") from None
    if not found:
        command = _command(name, folders[0])
        raise UserError(f"tfds:{name} is not prepared in {data_dir}; nothing is fetched unasked, prepare it: {command}", "data")
    formats = {folder: sorted(one.value for one in builder.info.available_file_formats()) for folder, builder in found.items()}
    folder = next((folder for folder in found if _FORMAT in formats[folder]), None)
    if folder is None:
        first = next(iter(found))
        command = _command(name, next((one for one in folders if one not in found), f"{folders[0]}_{_FORMAT}"))
        raise UserError(
            f"tfds:{name} was prepared as {' and '.join(formats[first])} in {first}, which cannot be read by number; prepare it "
            f'with file_format="{_FORMAT}": {command}',
            "data",
        )
    builder = found[folder]
    if _SPLIT not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise UserError(f'tfds:{name} has no split "{_SPLIT}", only {known}; give another data set.', "data")
    try:
        source = builder.as_data_source(_SPLIT, file_format=_FORMAT)
        source[0], source[len(source) - 1]  # its files are opened when they are read
        return source
    except Exception as error:  # files that are missing or cut off
        reason = reason_of(error, 160)
        raise UserError(f"tfds:{name} cannot be read in {builder.data_dir} ({reason}); prepare it again.", "data") from None


def _find(name: str, folder: str) -> Any:
    """The set as its files tell of it; None where there are none."""
    import tensorflow_datasets as tfds

    try:
        # From the files alone: the set's own code would begin to fetch it.
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        return None


def _command(name: str, folder: str) -> str:
    made = f"tfds.builder({name!r}, data_dir={folder!r}, file_format={_FORMAT!r}).download_and_prepare()"
    return f'python -c "import tensorflow_datasets as tfds; {made}"'
