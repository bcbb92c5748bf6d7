"""Public checkpoints by name: fetched and imported when first asked for, kept in the user's cache, offline from then on."""

from __future__ import annotations

import sys
from pathlib import Path

from e4t_jax.errors import UserError
from e4t_jax.interop.e4t_diffusion.checkpoint import import_checkpoint
from e4t_jax.storage import locked, user_cache

# Trained on FFHQ and CelebA-HQ with CompVis/stable-diffusion-v1-4, early in 2023: before OpenCLIP 2.23.
FACES = "mshing/e4t-diffusion-ffhq-celebahq-v1"


def faces_folder() -> Path:
    """The domain of the public checkpoint for faces; as `imported_once`."""
    return imported_once("faces", FACES)


def imported_once(name: str, checkpoint: str) -> Path:
    """The folder of a checkpoint's domain in the user's cache; the first of all processes that ask imports it, the others wait.

    Args:
        name: The domain's.
        checkpoint: Its Hub id.

    Errors: `UserError` as `import_checkpoint`.
    """
    folder = user_cache() / "domains" / name
    if _is_there(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write {folder}: {error.strerror or error}; set XDG_CACHE_HOME to another folder.") from None
    with locked(folder.parent, wait=False) as first:
        if first:
            return _import(folder, checkpoint)
    print(f"Another process imports {name}; waiting for it.", file=sys.stderr, flush=True)
    with locked(folder.parent):
        return folder if _is_there(folder) else _import(folder, checkpoint)


def _import(folder: Path, checkpoint: str) -> Path:
    if _is_there(folder):  # since it was looked for
        return folder
    try:
        imported = import_checkpoint(checkpoint, None, folder)
    except UserError as error:
        raise UserError(error.message, None if error.argument == "out" else "domain") from None
    for line in (f"Imported {checkpoint} into {folder}; it is read from there from now on.", *imported.notes):
        print(line, file=sys.stderr, flush=True)
    return folder


def _is_there(folder: Path) -> bool:
    return (folder / "domain.json").exists()
