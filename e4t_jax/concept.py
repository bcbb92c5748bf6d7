"""A personalised concept: what tuning learned about one picture, a small file of its own.

A file holds the picture's folded CLIP vector and the trained parts (see `objective.Trainable`): in scope "compact" a
residual and rank-1 factors, some kilobytes; float16 as a rule. Its header names scope and domain.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from e4t_jax.errors import UserError
from e4t_jax.objective import Trainable
from e4t_jax.writing import write_file

FORMAT = 1


class Concept(NamedTuple):
    """One concept of one domain; pytrees of JAX or NumPy arrays."""

    name: str
    scope: str
    domain: str  # fingerprint of the domain it was tuned in
    trainable: Trainable
    folded: Float[Array, " clip_width"]


def save_concept(path: Path, concept: Concept, dtype: Any = np.float16) -> int:
    """Writes a concept as `dtype`; returns the size of the file in bytes."""
    tree = {name: part for name, part in concept.trainable._asdict().items() if part is not None}
    # A factor's key is a path itself, so parts are joined by a sign that no path holds.
    flat = flatten_dict({**tree, "folded": concept.folded}, sep="|")
    header = {"format": str(FORMAT), "kind": "e4t concept", "scope": concept.scope, "domain": concept.domain}
    content = save({name: np.asarray(leaf, dtype) for name, leaf in flat.items()}, pack_header(header))
    write_file(path, content)
    return len(content)


def load_concept(path: Path, domain: str | None = None) -> Concept:
    """Reads a concept; `domain`, where given, is the fingerprint that it must have been tuned in.

    Errors: `UserError` for a file that is missing, damaged, of a newer format, no concept, or of another domain.
    """
    flat, header = read_tensors(path, "e4t concept", "a concept")
    if domain is not None and header["domain"] != domain:
        raise UserError(f"{path} was tuned in another domain or on another base; give the --domain it was tuned with.")
    tree = unflatten_dict(flat, sep="|")
    folded = tree.pop("folded")
    return Concept(Path(path).stem, header["scope"], header["domain"], Trainable(**tree), folded)


def read_tensors(path: Path, kind: str, what: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors (as float32) and header of one of our safetensors files.

    Errors: `UserError` for a file that is missing, damaged, of a newer format, or of another kind.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            flat = {name: jnp.asarray(file.get_tensor(name), jnp.float32) for name in file.keys()}  # noqa: SIM118, no dict
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}); make or copy it again.") from None
    if header.get("kind") != kind:
        raise UserError(f"{path} is not {what}; give a file that this package wrote as one.")
    if int(header["format"]) > FORMAT:
        raise UserError(f"{path} has format {header['format']}, this version reads up to {FORMAT}; update e4t-jax.")
    return flat, header


def pack_header(header: dict[str, str]) -> dict[str, str]:
    """A header as ONE entry: safetensors writes several in an order that changes from run to run."""
    return {"header": json.dumps(header, sort_keys=True)}


def header_json(header: dict[str, Any]) -> str:
    """JSON with sorted keys, so that equal content gives equal files."""
    return json.dumps(header, indent=2, sort_keys=True) + "\n"


def stack(concepts: list[Concept]) -> tuple[Trainable, Array]:
    """Trainable parts and folds with a leading axis of concepts.

    Errors: `UserError` when the concepts are of different scopes.
    """
    if len({concept.scope for concept in concepts}) > 1:
        scopes = ", ".join(f"{concept.name} ({concept.scope})" for concept in concepts)
        raise UserError(f"--concepts of different scopes cannot be drawn in one call: {scopes}; call once a scope.")
    trainables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[concept.trainable for concept in concepts])
    return trainables, jnp.stack([jnp.asarray(concept.folded) for concept in concepts])
