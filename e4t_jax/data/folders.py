"""Folders of pictures as people have them: which files in them are pictures, and what systems and programs left there."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

# What file managers, cameras' programs and network storage keep beside pictures; hidden names (".…") are left out as well.
_DEBRIS = frozenset(("@eadir", "__macosx", "#recycle", "#snapshot", "$recycle.bin", "thumbs.db", "lost+found", "__pycache__"))


def picture_files(folder: Path) -> list[Path]:
    """What is named as a picture that Pillow opens, masks among it, in a folder and its subfolders, in the order of the paths.

    Hidden files and folders, trash, thumbnails and caches below the folder are left out. Linked subfolders are followed, each
    place once on a way down: a loop of links ends where it began.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found: list[Path] = []
    for root, folders, files in os.walk(folder, followlinks=True):
        above = {os.path.realpath(str(one)) for one in (root, *Path(root).parents)}
        folders[:] = [name for name in folders if not _is_debris(name) and os.path.realpath(Path(root, name)) not in above]
        found += [Path(root, name) for name in files if not _is_debris(name) and Path(name).suffix.lower() in endings]
    return sorted(found)


def _is_debris(name: str) -> bool:
    return name.startswith(".") or name.lower() in _DEBRIS
