"""Writing files so that a reader never finds half of one: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from e4t_jax.errors import UserError


def write_file(path: Path, content: bytes | str) -> Path:
    """Writes `content` to `path`, folders included; on failure nothing is left behind.

    Errors: `UserError` when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}; choose another --out or free some space.") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def check_writable(folder: Path) -> Path:
    """Makes the folder and proves that it can be written, before hours of work go into what it shall hold.

    Errors: `UserError` when it cannot.
    """
    folder = Path(folder)
    probe = write_file(folder / ".probe", b"")
    probe.unlink()
    return folder
