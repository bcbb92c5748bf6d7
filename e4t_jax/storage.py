"""Files that are whole or not there, and that say when they were changed: how everything this package writes is written.

* A file is written under a temporary name in its own folder, then renamed; several that belong together are renamed only when
  all of them are written.
* Files of one folder that belong together are renamed while the folder is locked, and read under that lock.
* Our safetensors files carry a checksum over names, shapes, numbers and header; reading verifies it. So do our JSON
  files that others depend on.
* Where a safetensors file cannot carry one (the base model's, which PyTorch reads too), the JSON file beside it does.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float16
from safetensors import SafetensorError
from safetensors.numpy import load as load_bytes
from safetensors.numpy import save as save_bytes

try:
    import fcntl
except ImportError:  # Windows has none: there, files are whole, but two writers of one folder may mix theirs
    fcntl = None  # type: ignore[assignment]

from e4t_jax.errors import UserError, reason_of
from e4t_jax.files.places import refuse_address

FORMAT = 3  # of concepts and domains; 1 had no checksum, 2 no quantised factors
_SPARE = 2**20  # bytes left free beside what is written
_BEHIND = 32  # files that wait to be written


def write_file(path: Path, content: bytes | str) -> Path:
    """Writes `content` to `path`, folders included; on failure nothing is left behind, and an older file stays.

    Errors: `UserError` when the folder cannot be written or the disk is full.
    """
    write_files({Path(path): content})
    return Path(path)


def user_cache() -> Path:
    """The folder of this user for what can be made again: `$XDG_CACHE_HOME/e4t-jax`, as a rule `~/.cache/e4t-jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "e4t-jax"


def write_files(contents: Mapping[Path, bytes | str | Path]) -> None:
    """Writes files that belong together: all of them, or, when one cannot be written, none; the last is renamed last.

    Content that is a `Path` is a file on the same disk, made before: it is moved to its place.

    Errors: `UserError` as `write_file`.
    """
    contents = {Path(path): content for path, content in contents.items()}
    for place in contents:
        refuse_address(place)
    temporary: dict[Path, str] = {}
    path = None
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                temporary[path] = str(content)
            else:
                handle, temporary[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
                with os.fdopen(handle, "wb") as file:
                    file.write(content.encode() if isinstance(content, str) else content)
            with open(temporary[path], "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary[path], 0o666 & ~_umask())
            if path.is_dir():
                raise IsADirectoryError(21, "it is a folder")
        with contextlib.ExitStack() as locks:
            if len(contents) > 1:
                for folder in sorted({path.parent for path in contents}):
                    locks.enter_context(locked(folder))
            path = _rename_all(temporary)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        path = getattr(error, "renamed_to", path)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot write {path}: {reason}; choose another folder or free some space.") from None
    finally:
        for name in temporary.values():
            with contextlib.suppress(OSError):
                os.unlink(name)


@contextlib.contextmanager
def written_behind() -> Iterator[Callable[[Path, bytes], None]]:
    """Yields what writes a file in another thread, each at once whole: work goes on meanwhile.

    Errors: `UserError` as `write_file`, at a later call or at the end.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting: collections.deque[Future] = collections.deque()

        def write(path: Path, content: bytes) -> None:
            waiting.append(pool.submit(write_file, path, content))
            while waiting and (len(waiting) > _BEHIND or waiting[0].done()):
                waiting.popleft().result()

        yield write
        for one in waiting:
            one.result()


def _rename_all(temporary: Mapping[Path, str]) -> Path | None:
    """Renames files to their places; where one cannot be, those before it are put back as they were."""
    older: dict[Path, str] = {}
    done: list[Path] = []
    path = None
    try:
        for path in temporary if len(temporary) > 1 else ():
            if path.exists():
                older[path] = str(path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}"))
                os.link(path, older[path])
        for path, name in temporary.items():
            os.replace(name, path)
            done.append(path)
    except OSError as error:
        for renamed in done:
            with contextlib.suppress(OSError):
                if renamed in older:
                    os.replace(older[renamed], renamed)
                else:
                    os.unlink(renamed)
        error.renamed_to = path  # type: ignore[attr-defined]
        raise
    finally:
        for name in older.values():
            with contextlib.suppress(OSError):
                os.unlink(name)
    return path


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a folder, which ends with the process; yields whether it could be had: False only without `wait`."""
    handle = None
    try:
        if fcntl is not None:
            # A file system without locks is as one without other writers.
            with contextlib.suppress(OSError):
                handle = os.open(folder, os.O_RDONLY)
        if handle is not None:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            try:
                fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass
        yield True
    finally:
        if handle is not None:
            os.close(handle)


def _umask() -> int:
    """The user's file mode mask; the system tells it only by setting it, its status file tells it without."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def check_writable(folder: Path, *, argument: str = "out", needed: int = 0) -> Path:
    """Proves that the folder can be made and written, and `needed` bytes too, before hours of work go into what it shall hold.

    It is made with its first file: a mistake found later leaves no empty folder.

    Errors: `UserError` when it cannot.
    """
    folder = Path(folder)
    refuse_address(folder, argument)
    try:
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(parent))
        # In a folder of its own where it is to be made: its name may be what cannot be.
        with tempfile.TemporaryDirectory(dir=there, prefix=".writable.") as probe:
            Path(probe, *folder.absolute().relative_to(there).parts).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(there).free
    except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, NotADirectoryError) or os.path.isfile(folder):
            reason = "a file is in its place"
        raise UserError(f"Cannot write {folder}: {reason}; choose another folder.", argument) from None
    if free < needed + _SPARE:
        raise UserError(
            f"{folder} has {free / 1e9:.2f} GB left, and {(needed + _SPARE) / 1e9:.2f} GB will be needed; free some space.",
            argument,
        )
    return folder


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A folder on the same disk as `beside`, gone afterwards: what is made in it is moved to its place or lost.

    Errors: `UserError` when it cannot be made, or what is written in it fails; it names `beside`.
    """
    refuse_address(beside)
    beside = Path(os.path.abspath(beside))
    folder = None
    made = [parent for parent in beside.parents if not parent.exists()]
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=beside.parent, prefix=f".{beside.name}."))
        yield folder
    except UserError as error:
        raise UserError(error.message.replace(str(folder), str(beside)), error.argument) from None
    except OSError as error:
        raise UserError(f"Cannot write {beside}: {error.strerror or error}; choose another folder or free some space.") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        # Those that hold something now are not removed.
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()


def move_files(made: Path, folder: Path) -> None:
    """All files of `made`, on the same disk, to their places in `folder`; where one cannot be, older ones stay as they were.

    Those at the top come last: an index is not there before what it names.

    Errors: `UserError` when one cannot be moved.
    """
    found = sorted((file for file in made.rglob("*") if file.is_file()), key=lambda file: (-len(file.parts), file))
    files = {folder / file.relative_to(made): str(file) for file in found}
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(21, "it is a folder")
        with locked(folder):
            _rename_all(files)
    except OSError as error:
        path = getattr(error, "renamed_to", path)
        raise UserError(f"Cannot write {path}: {error.strerror or error}; choose another folder.") from None


def to_json(content: Mapping[str, Any]) -> str:
    """JSON with sorted keys, so that equal content gives equal files; it knows no NaN."""
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """A JSON object.

    Errors: `UserError` when it is missing, damaged or no object; `mend` says what to do about it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {mend}.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder where a file should be; {mend}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged; {mend}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {mend}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object of names and values; {mend}.")
    return content


def to_signed_json(content: Mapping[str, Any]) -> str:
    """`to_json` with a checksum over all the rest."""
    plain = json.loads(to_json(content))
    return to_json({**plain, "checksum": _json_digest(plain)})


def check_signed(path: Path, content: Mapping[str, Any], mend: str) -> None:
    """Errors: `UserError` when a JSON object that was signed is not what it was signed as; one without checksum passes."""
    if "checksum" in content and content["checksum"] != _json_digest(content):
        raise UserError(f"{path} was changed since it was written (its checksum differs); {mend}.")


def _json_digest(content: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def pack(tensors: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> bytes:
    """A safetensors file with `header` and a checksum in ONE entry: safetensors orders several anew in every run."""
    plain = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    signed = {**header, "format": str(FORMAT)}
    signed["checksum"] = _digest(plain, signed)
    return save_bytes(plain, {"header": json.dumps(signed, sort_keys=True)})


def unpack(path: Path, kind: str, what: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and header of a file that `pack` made; `kind` is what its header must say, `what` what a message calls it.

    Errors: `UserError` for a file that is missing, damaged, changed, of a newer format, of another kind, or with a number
    that is not finite.
    """
    mend = "make or copy it again"
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); check the path.") from None
    try:
        length = int.from_bytes(content[:8], "little")
        described = json.loads(content[8 : 8 + length])
        header = json.loads(described.get("__metadata__", {}).get("header", "{}"))
        tensors = load_bytes(content)
    except (SafetensorError, MemoryError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        reason = reason_of(error)
        raise UserError(f"{path} is damaged or no safetensors file ({reason}); {mend}.") from None
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise UserError(f"{path} is not {what}; give a file that this package wrote as one.")
    number = str(header.get("format", ""))
    if not (number.isascii() and number.isdecimal() and len(number) < 9 and int(number)):
        raise UserError(f"{path} is damaged (its header names no format); {mend}.")
    if int(number) > FORMAT:
        raise UserError(f"{path} has format {number}, this version reads up to {FORMAT}; update e4t-jax.")
    if int(number) > 1 or "checksum" in header:
        signed = header.pop("checksum", None)
        if signed != _digest(tensors, header):
            raise UserError(f"{path} was changed since it was written (its checksum differs); {mend}.")
    for name, tensor in tensors.items():
        with np.errstate(over="ignore"):  # beyond float32 is not finite here
            finite = np.issubdtype(tensor.dtype, np.number) and np.isfinite(tensor.astype(np.float32)).all()
        if not finite:
            raise UserError(f"{path}: {name} holds numbers that are not finite; {mend}.")
    return tensors, header


def _digest(tensors: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape};".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: bytes) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(content).hexdigest()


def _at_hand(leaf: Any) -> Any:
    """A CPU's array as NumPy's, which is no copy and compiles nothing; an accelerator's as it is."""
    devices = leaf.devices() if isinstance(leaf, jax.Array) and leaf.is_fully_addressable else ()
    return np.asarray(leaf) if any(device.platform == "cpu" for device in devices) else leaf


def fingerprint(*trees: Mapping[str, Any]) -> str:
    """A short hash of some trees, in float16: files know by it what they belong to.

    Of a large leaf, a thousand numbers spread over it are read: no retrained model leaves them all as they were.
    """
    digest = hashlib.sha256()
    for tree in trees:
        for path, leaf in sorted(flatten_dict(tree, sep="/").items()):
            digest.update(path.encode() + sample_of(leaf).tobytes())
    return digest.hexdigest()[:16]


def sample_of(leaf: Any) -> Float16[np.ndarray, " numbers"]:
    """The numbers that `fingerprint` reads of a leaf, at most two thousand; of such a sample it reads all."""
    with np.errstate(over="ignore"):
        return np.asarray(_at_hand(leaf).reshape(-1)[:: max(1, leaf.size // 1000)], np.float16)
