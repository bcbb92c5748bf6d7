"""Pictures for domain pretraining as Grain datasets: a registered source, any TFDS dataset, or a folder of pictures.

A row is `image` (float32 `[size, size, 3]` in [-1, 1]), `mask` (float32 `[size, size]`, ones where there is none) and, where the
data has one, `caption` (a prompt with the placeholder). A row depends on its number alone, whoever reads it: in the place of a
picture of a folder that cannot be read stands the next one that can, and `Broken` finds out from `asked` and `read`, the numbers of
the two, in whatever process they were read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from e4t_jax import registry
from e4t_jax.data.cache import MANIFEST, CachedRows
from e4t_jax.data.folders import picture_files
from e4t_jax.data.images import is_mask, read_image
from e4t_jax.data.prepared_sets import open_prepared
from e4t_jax.errors import UserError, reason_of
from e4t_jax.files.places import local_data
from e4t_jax.storage import file_digest

if TYPE_CHECKING:
    import grain.python as grain

_KINDS = ("folder", "cache", "tfds")
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # module:function, the module dotted


class Broken:
    """The pictures of a folder that could not be read: each is said once, when a row that it belongs to is met, and counted."""

    def __init__(self, say: Callable[[str], None] = warnings.warn):
        self.say = say
        self.source: FolderSource | None = None
        self.rows: set[int] = set()

    def meet(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row or a batch without `asked` and `read`, after a look at them."""
        asked, read = (np.atleast_1d(row.pop(name, ())) for name in ("asked", "read"))
        for first, last in zip(asked.tolist(), read.tolist(), strict=True):
            while first != last and self.source is not None:
                if first not in self.rows:
                    self.rows.add(first)
                    self.say(f"Skipped, with the next picture in its place: {self.source.reason(first)}")
                first = (first + 1) % len(self.source)
        return row


@dataclasses.dataclass(frozen=True)
class Split:
    """Which rows of data are read: `held_out` of them, spread evenly over its order, or all others."""

    held_out: int
    validation: bool

    def rows(self, count: int) -> np.ndarray:
        """Their numbers among `count`.

        Errors: `UserError` when nothing is left to learn from.
        """
        if self.held_out >= count:
            raise UserError(f"{self.held_out} of the {count} pictures of the data leave none to learn from; lower it.", "held_out")
        held = np.arange(self.held_out) * count // self.held_out
        return held if self.validation else np.setdiff1d(np.arange(count), held)


class _Rows:
    """Some rows of a source."""

    def __init__(self, source: Any, rows: np.ndarray):
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.source[int(self.rows[index])]


class FolderSource:
    """The pictures of a folder and its subfolders by number, in the order of their paths; `NAME.mask.png` is a mask, not a picture.

    In the place of a picture that cannot be read is the next one that can be, in the order of the paths; of a `split`, of its own.

    Errors: `UserError` when the folder does not exist or holds no picture, and where none of them can be read.
    """

    def __init__(self, folder: Path, size: int, split: Split | None = None):
        if not os.path.isdir(folder):
            raise UserError(f"folder:{folder} is no folder; check the path.", "data")
        self.paths = [path for path in picture_files(Path(folder)) if not is_mask(path) and path.is_file()]
        self.size = size
        if not self.paths:
            raise UserError(f"folder:{folder} holds no picture that Pillow opens (hidden files are left out).", "data")
        if split is not None:
            self.paths = [self.paths[row] for row in split.rows(len(self.paths))]
        self.folder = folder

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self.paths)
        for row in ((index + step) % count for step in range(count)):
            try:
                image, mask = read_image(self.paths[row], self.size)
            except UserError:
                continue
            mask = np.ones(image.shape[:2], np.float32) if mask is None else mask
            return {"image": image, "mask": mask, "asked": np.int64(index), "read": np.int64(row)}
        raise UserError(f"folder:{self.folder} holds no picture that can be read ({self.reason(0)})", "data")

    def reason(self, row: int) -> str:
        """Why picture `row` could not be read."""
        try:
            read_image(self.paths[row], self.size)
        except UserError as error:
            return str(error)
        return f"{self.paths[row]} could not be read at first; check the disk."


def open_pictures(
    spec: str, size: int, data_dir: str | Path, broken: Broken | None = None, split: Split | None = None
) -> grain.MapDataset:
    """Rows with `image`, `mask` and, where the data set has one, `caption` (str); `broken` will know of files that cannot be read.

    `spec` is a registered name ("creatures"), "tfds:NAME" (`data.prepared_sets`; a feature `image` is needed), "folder:DIR",
    "cache:DIR", whose rows are encoded (`data.cache`), or "MODULE:FUNCTION", which can be imported: (data_dir) -> source. With a
    `split`, only its rows; all views of a picture are on one side.

    Errors: `UserError` for another form, a folder without pictures, or a data set that is not there.
    """
    import grain.python as grain

    spec = local_data(spec)
    kind, _, name = spec.partition(":")
    if kind == "folder" and name:
        folder = FolderSource(Path(name), size, split)
        if broken is not None:
            broken.source = folder
        return grain.MapDataset.source(folder)
    if kind == "cache" and name:
        cached = CachedRows(Path(name))
        if split is None:
            return grain.MapDataset.source(cached)
        views = cached.manifest.views
        rows = split.rows(cached.manifest.pictures)[:, None] * views + np.arange(views)
        return grain.MapDataset.source(_Rows(cached, rows.ravel()))
    registered = registry.find("data", spec)
    if registered is not None:
        source = registered(data_dir)
    elif _FUNCTION.fullmatch(spec) and kind not in _KINDS:
        source = _open_function(spec, data_dir)
    elif kind == "tfds" and name:
        source = open_prepared(name, data_dir)
    else:
        known = ", ".join(registry.names("data"))
        raise UserError(f"{spec!r} is unknown; give {known}, tfds:NAME, folder:DIR, cache:DIR or MODULE:FUNCTION.", "data")
    if split is not None:
        source = _Rows(source, split.rows(len(source)))
    return grain.MapDataset.source(source).map(partial(_convert, spec, size))


def _convert(spec: str, size: int, row: dict[str, Any]) -> dict[str, Any]:
    """A row of a registered source or of TFDS as this module's."""
    if "image" not in row:
        raise UserError(f"{spec} has no feature `image`, only {', '.join(row)}.", "data")
    image, mask = read_image(np.asarray(row["image"]), size, mask=np.asarray(row["mask"]) if "mask" in row else None)
    converted: dict[str, Any] = {"image": image, "mask": np.ones((size, size), np.float32) if mask is None else mask}
    caption = row.get("caption")
    if isinstance(caption, bytes):
        caption = caption.decode(errors="replace")
    if not isinstance(caption, str | None):
        raise UserError(f"{spec} has captions that are no text ({type(caption).__name__}).", "data")
    return converted if caption is None else {**converted, "caption": caption}


def folder_digest(spec: str) -> str | None:
    """What tells one folder of pictures from another: names and sizes of its files, or a cache's checksums; None for other data."""
    kind, _, name = spec.partition(":")
    if kind == "cache":
        return file_digest(Path(name) / MANIFEST)[:16]
    if kind != "folder":
        return None
    listed = "\n".join(f"{path.relative_to(name)} {path.stat().st_size}" for path in picture_files(Path(name)))
    return hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()[:16]


def _open_function(spec: str, data_dir: str | Path) -> Any:
    """What the function "module:function" gives.

    Errors: `UserError` when it cannot be imported, or gives no source; its own errors are passed on.
    """
    try:
        function = registry.load(spec)
    except Exception as error:  # a module runs anything
        mend = "install its module, or put its folder on PYTHONPATH"
        raise UserError(f"{spec} cannot be imported ({reason_of(error)}); {mend}.", "data") from None
    source = function(data_dir) if callable(function) else function
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise UserError(f"{spec} gives {type(source).__name__}, not a source: an object with a length and rows by number.", "data")
    return source
