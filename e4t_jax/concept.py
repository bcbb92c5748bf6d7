"""A personalised concept: what tuning learned about one picture, a small file of its own.

A file holds the picture's folded CLIP vector and the trained parts (see `objective.Trainable`): in scope "compact" a
residual and rank-1 factors, some kilobytes; float16 as a rule. Its header names scope and domain, and carries a checksum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.errors import UserError
from e4t_jax.objective import Trainable
from e4t_jax.scopes import SCOPES
from e4t_jax.storage import pack, unpack, write_file

_KIND = "e4t concept"


class Concept(NamedTuple):
    """One concept of one domain; pytrees of JAX or NumPy arrays."""

    name: str
    scope: str
    domain: str  # fingerprint of the domain it was tuned in
    trainable: Trainable
    folded: Float[Array | np.ndarray, " clip_width"]
    origin: str = ""  # a checksum of picture and settings: what would be made of the same again, is this

    def __repr__(self) -> str:
        numbers = sum(leaf.size for leaf in jax.tree.leaves((self.trainable, self.folded)))
        return f"Concept({self.name!r}, scope={self.scope!r}, {numbers} numbers, domain {self.domain})"


def save_concept(path: str | Path, concept: Concept, dtype: Any = np.float16) -> int:
    """Writes a concept as `dtype`; returns the size of the file in bytes.

    Errors: `UserError` when it cannot be written, or holds what `dtype` cannot.
    """
    content = concept_bytes(concept, dtype)
    write_file(Path(path), content)
    return len(content)


def concept_bytes(concept: Concept, dtype: Any = np.float16) -> bytes:
    """What a concept's file holds.

    Errors: `UserError` for numbers that `dtype` cannot hold.
    """
    tree = {name: part for name, part in concept.trainable._asdict().items() if part is not None}
    # A factor's key is a path itself, so parts are joined by a sign that no path holds.
    flat = flatten_dict({**tree, "folded": concept.folded}, sep="|")
    with np.errstate(over="ignore"):
        tensors = {name: np.asarray(leaf).astype(dtype) for name, leaf in flat.items()}
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise UserError(f"{concept.name} holds numbers beyond {np.dtype(dtype)}; lower the learning rate it was tuned with.")
    return pack(tensors, {"kind": _KIND, "scope": concept.scope, "domain": concept.domain, "origin": concept.origin})


def load_concept(path: str | Path, domain: str | None = None) -> Concept:
    """Reads a concept; `domain`, where given, is the fingerprint that it must have been tuned in.

    Errors: `UserError` for a file that is missing, damaged, changed, of a newer format, no concept, or of another domain.
    """
    flat, header = unpack(Path(path), _KIND, "a concept")
    parts = {name.partition("|")[0] for name in flat}
    scope = SCOPES.get(str(header.get("scope")))
    if scope is None or not parts <= {"folded", *(part for part in Trainable._fields if getattr(scope, part, True))}:
        raise UserError(f"{path} is no concept of this version; tune it again.")
    if domain is not None and header.get("domain") != domain:
        raise UserError(f"{path} was tuned in another domain or on another base; give the domain it was tuned with.")
    try:
        tree = unflatten_dict({name: jnp.asarray(leaf, jnp.float32) for name, leaf in flat.items()}, sep="|")
        folded = tree.pop("folded")
        whole = folded.ndim == 1 and all(
            {name: leaf.ndim for name, leaf in pair.items()} == {"rows": 2, "columns": 2}
            for pair in tree.get("factors", {}).values()
        )
    except (TypeError, AttributeError, KeyError):  # a name that is part and whole at once
        whole = False
    if not whole:
        raise UserError(f"{path} lacks a part of a concept; tune it again.")
    return Concept(Path(path).stem, header["scope"], header.get("domain", ""), Trainable(**tree), folded, header.get("origin", ""))
