"""Traced programs kept between processes, beside JAX's own cache of compiled ones: a second run need not trace again.

JAX finds a compiled program by what it was lowered from, so it traces and lowers before it looks. Here a program is found by what
its trace follows from: static settings, shapes, devices, the versions of the libraries and this package's source. It is kept as
`jax.export` writes it (StableHLO; nothing in it is ever unpickled).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.export
import numpy as np

import e4t_jax
from e4t_jax.errors import UserError
from e4t_jax.storage import write_file

_KEPT = 64  # programs; those used longest ago make room


def folder() -> Path | None:
    """Where traced programs are kept: in JAX's cache of compiled ones, where one is set."""
    cache = getattr(jax.config, "jax_compilation_cache_dir", None)
    return Path(cache) / "traced" if cache else None


def kept(program: Any, static: Any, arguments: Sequence[Any], devices: Sequence[jax.Device]) -> Any:
    """`program`, a jitted function of lists of arrays, or the trace of it that an earlier process kept.

    `static` is plain data that tells this program from all others that are traced for arguments of the same shapes; where it is
    None nothing is kept.
    """
    home = folder()
    if home is None or static is None:
        return program
    file = home / f"{_key(static, arguments, devices)}.stablehlo"
    exported = _read(file)
    if exported is None:
        exported = jax.export.export(program)(*arguments)
        # A folder that cannot be written costs the next run its time, and this one nothing.
        with contextlib.suppress(UserError, OSError):
            write_file(file, bytes(exported.serialize()))
            _make_room(home)
    return jax.jit(exported.call)


def _read(file: Path) -> jax.export.Exported | None:
    """The trace in a file; None where there is none that can be read."""
    try:
        exported = jax.export.deserialize(bytearray(file.read_bytes()))
        file.touch()
    except Exception:  # missing, damaged, of another version: whatever it is, tracing again mends it
        return None
    return exported


def _make_room(home: Path) -> None:
    files = sorted(home.glob("*.stablehlo"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[_KEPT:]:
        file.unlink(missing_ok=True)


def _key(static: Any, arguments: Sequence[Any], devices: Sequence[jax.Device]) -> str:
    shapes = [(np.shape(leaf), str(getattr(leaf, "dtype", type(leaf).__name__))) for leaf in jax.tree.leaves(arguments)]
    versions = [jax.__version__, jax.lib.__version__, flax.__version__, _source_digest()]
    where = [(device.platform, device.device_kind) for device in devices]
    options = {name: str(value) for name, value in jax.config.values.items() if name in _TRACED_OPTIONS}
    content = json.dumps([plain(static), shapes, str(jax.tree.structure(arguments)), versions, where, options], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


# Options of JAX that change what is traced.
_TRACED_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")


@functools.cache
def _source_digest() -> str:
    """A checksum of this package's code."""
    root = Path(e4t_jax.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def made_here(structure: jax.tree_util.PyTreeDef) -> bool:
    """Whether all kinds of nodes of a tree are Python's own or this package's, whose source `kept` compares."""
    node = structure.node_data()
    return node is None or (
        node[0].__module__.partition(".")[0] in ("builtins", e4t_jax.__name__) and all(map(made_here, structure.children()))
    )


def static_fields(value: Any) -> list[dataclasses.Field]:
    """The fields of a pytree's dataclass that are part of its structure, not leaves."""
    return [field for field in dataclasses.fields(value) if not field.metadata.get("pytree_node", True)]


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences of plain values, as JSON takes them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
