"""Where a name leads, as people write paths: `~`, `$HOME`, `file://`; and what no file of this machine can be.

    local_path("~/pictures")            -> /home/ada/pictures
    local_path("$SCRATCH/run")          -> /scratch/ada/run
    local_path("file:///data/base")     -> /data/base
    local_path("gs://bucket/run")       UserError: mount it

What there is by the name as it was written is never taken for another: a file may be called `~` or `$5.png`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from e4t_jax.errors import UserError

# Two letters at least: a drive of Windows has one. A `Path` has dropped one of the slashes.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,3}(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_MENDS = {
    "http": "download it, and give the file or folder",
    "https": "download it, and give the file or folder",
    "hf": "give its Hub id, such as owner/model, or a folder",
    "gs": "mount the bucket (gcsfuse) and give the folder it is mounted on",
    "s3": "mount the bucket (mount-s3, s3fs) and give the folder it is mounted on",
}
_MOUNT = "give a folder or a file of this machine, or mount it and give the folder it is mounted on"


def local_path(name: str | Path, argument: str | None = None) -> Path:
    """The path that a name leads to.

    Args:
        name: As it was written.
        argument: The argument that it was given for, for messages.

    Errors: `UserError` for an address that is no path (`gs://…`), for a variable at a name's beginning that is not set, and for
        the home folder of nobody.
    """
    text = os.fspath(name)
    if not text or os.path.lexists(text) or os.path.lexists(text.split(os.sep)[0]):
        return Path(text)
    address = _SCHEME.match(text)
    if address is not None and address[1].lower() == "file":
        return local_path(f"/{address[2]}", argument)
    refuse_address(text, argument)
    text = os.path.expandvars(os.path.expanduser(text))
    first, unset = text.split(os.sep)[0], _VARIABLE.match(text)
    if unset is not None:
        raise UserError(f"{text}: ${unset[1] or unset[2]} is not set; set it, or give the path itself.", argument)
    if first.startswith("~"):
        raise UserError(f"{text}: no home folder is known for {first}; give the path itself.", argument)
    return Path(text)


def refuse_address(path: str | Path, argument: str | None = None) -> None:
    """Errors: `UserError` for an address that is no path of this machine, such as `gs://bucket/run`.

    Args:
        path: A path that is about to be made.
        argument: The argument that it was given for, for messages.
    """
    address = _SCHEME.match(os.fspath(path))
    if address is not None and not os.path.isdir(f"{address[1]}:"):
        mend = _MENDS.get(address[1].lower(), _MOUNT)
        raise UserError(f"{address[1]}://{address[2]} is no path of this machine; {mend}.", argument)


def local_name(name: str, argument: str | None = None) -> str:
    """A name that may be a path or something else, such as a Hub id: with `local_path`'s path where it is written as one.

    Args:
        name: As it was written: "creatures", "owner/model", "random:sd15", "~/base".
        argument: The argument that it was given for, for messages.

    Errors: `UserError` as `local_path`.
    """
    return str(local_path(name, argument)) if name.startswith(("~", "$")) or _SCHEME.match(name) else name


def local_data(spec: str, argument: str = "data") -> str:
    """The name of data, with the path in it as `local_path` has it: "folder:~/cats" -> "folder:/home/ada/cats".

    Args:
        spec: "folder:DIR", "cache:DIR" or any other name of data, which stays as it is.
        argument: The argument that it was given for, for messages.

    Errors: `UserError` as `local_path`.
    """
    kind, colon, name = spec.partition(":")
    if kind in ("folder", "cache") and colon:
        return f"{kind}:{local_name(name, argument)}"
    if kind != "tfds" and _SCHEME.match(spec):
        local_path(spec, argument)  # says what it is
    return spec
