"""A concept on disk: one small file.

A file holds the picture's folded CLIP vector and the trained parts (see `objective.Trainable`), float16 as a rule. Of a scope with
`bits`, the factors are quantised (`files.quantisation`): all rows lie in one tensor and all columns in another, each with a scale
for every kernel, in the order of the header's layout, {kernel: [*stack, in, out, rank]}. The header names scope and domain, too,
and carries a checksum; under "tuning" it says what the concept was tuned with: steps, seed, rates, the captions and their weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from e4t_jax import offsets
from e4t_jax.concept import Concept
from e4t_jax.errors import UserError
from e4t_jax.files.places import local_path
from e4t_jax.files.quantisation import dequantise, pack_bits, quantise, unpack_bits
from e4t_jax.objective import Trainable
from e4t_jax.offsets import Factors
from e4t_jax.storage import pack, unpack, write_file
from e4t_jax.tuning.scopes import SCOPES, find_scope

_KIND = "e4t concept"
# Bits of each number of the factors' rows, and of their columns, by scope; float16 where a scope is not listed. What they cost and
# keep is in docs/results.md.
_BITS = {"compact": (4, 5)}


def save_concept(path: str | Path, concept: Concept, dtype: Any = None) -> int:
    """Writes a concept to a file, whole or not at all; returns the file's size in bytes.

    Args:
        path: The file, as a rule `NAME.safetensors`.
        concept: The concept.
        dtype: Of every number in the file; where not given, float16, with the factors in the few bits that the scope names.

    Errors: `UserError` when it cannot be written, or holds numbers that the file cannot.
    """
    content = concept_bytes(concept, dtype)
    write_file(local_path(path, "path"), content)
    return len(content)


def concept_bytes(concept: Concept, dtype: Any = None) -> bytes:
    """What a concept's file holds; with `dtype` nothing is quantised.

    Errors: `UserError` for numbers that the file cannot hold, and for an unknown scope.
    """
    tree = {name: part for name, part in concept.trainable._asdict().items() if part is not None}
    header: dict[str, Any] = {"kind": _KIND, "scope": concept.scope, "domain": concept.domain, "origin": concept.origin}
    header |= {"tuning": dict(concept.tuning)} if concept.tuning else {}
    find_scope(concept.scope)
    bits = _BITS.get(concept.scope) if dtype is None and tree.get("factors") else None
    tensors: dict[str, np.ndarray] = {}
    if bits is not None:
        tensors, layout = _quantised(tree.pop("factors"), bits)
        header |= {"layout": layout, "bits": list(bits)}
    number = np.dtype(np.float16 if dtype is None else dtype)
    # A factor's key is a path itself, so parts are joined by a sign that no path holds.
    flat = flatten_dict({**tree, "folded": concept.folded}, sep="|")
    with np.errstate(over="ignore"):
        tensors |= {name: np.asarray(leaf).astype(number) for name, leaf in flat.items()}
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise UserError(f"{concept.name} holds numbers beyond {number}; lower the learning rate it was tuned with.")
    return pack(tensors, header)


def _quantised(factors: Factors, bits: tuple[int, int]) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Tensors of the file, and their layout."""
    names = sorted(factors)
    layout = {name: offsets.layout(factors[name]) for name in names}
    tensors = {}
    for side, each in zip(offsets.shapes_of(layout[names[0]]), bits, strict=True):
        pairs = [quantise(np.asarray(factors[name][side]), each) for name in names]
        tensors[f"{side}|codes"] = pack_bits(np.concatenate([codes.ravel() for codes, _ in pairs]), each)
        tensors[f"{side}|scales"] = np.array([scale for _, scale in pairs], np.float32)
    return tensors, layout


def _dequantised(flat: dict[str, np.ndarray], header: dict[str, Any]) -> Factors:
    """The factors, taken out of the file's tensors.

    Errors: `ValueError`, `TypeError`, `AttributeError` or `KeyError` for a layout that the tensors do not have.
    """
    layout = sorted(header["layout"].items())
    if not all(size > 0 for _, sizes in layout for size in sizes) or not all(0 < bits <= 8 for bits in header["bits"]):
        raise ValueError("no layout")
    factors: Factors = {name: {} for name, _ in layout}
    promised = [offsets.shapes_of(sizes) for _, sizes in layout]
    for side, bits in zip(promised[0], header["bits"], strict=True):
        shapes = [sides[side] for sides in promised]
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        codes = np.split(unpack_bits(flat.pop(f"{side}|codes"), bits, int(ends[-1])), ends[:-1])
        for (name, _), shape, own, scale in zip(layout, shapes, codes, flat.pop(f"{side}|scales"), strict=True):
            factors[name][side] = jnp.asarray(dequantise(own.reshape(shape), scale, bits))
    return factors


def load_concept(path: str | Path, domain: str | None = None) -> Concept:
    """Reads a concept that `save_concept` wrote, and verifies its checksum.

    Args:
        path: The file; its name without the ending is the concept's.
        domain: Where given, the fingerprint (`Domain.fingerprint`) of the domain that it must have been tuned in.

    Errors: `UserError` for a file that is missing, damaged, changed, of a newer format, no concept, or of another domain.
    """
    path = local_path(path)
    flat, header = unpack(path, _KIND, "a concept")
    scope = SCOPES.get(str(header.get("scope")))
    allowed = {"folded", *((*scope.parts, *scope.brings) if scope else ())}
    try:
        factors = {"factors": _dequantised(flat, header)} if "layout" in header else {}
        parts = {name.partition("|")[0] for name in flat}
        if scope is None or not parts | set(factors) <= allowed:
            raise UserError(f"{path} is no concept of this version; tune it again.")
        if domain is not None and header.get("domain") != domain:
            raise UserError(f"{path} was tuned in another domain or on another base; give the domain it was tuned with.")
        tree = {**unflatten_dict(flat, sep="|"), **factors}
        tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
        folded = tree.pop("folded")
        whole = folded.ndim == 1 and offsets.misfit(tree.get("factors", {})) is None
    # a name that is part and whole at once; a layout of other tensors
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError):
        whole = False
    if not whole:
        raise UserError(f"{path} lacks a part of a concept; tune it again.")
    tuning = header.get("tuning")
    return Concept(
        name=Path(path).stem,
        scope=header["scope"],
        domain=header.get("domain", ""),
        trainable=Trainable(**tree),
        folded=folded,
        origin=header.get("origin", ""),
        tuning=tuning if isinstance(tuning, dict) else None,
    )


def concept_at(path: str | Path) -> Concept | None:
    """The concept in a file; None where there is no file, or it is not whole.

    Args:
        path: The file.

    Errors: none.
    """
    try:
        return load_concept(path)
    except UserError:
        return None
