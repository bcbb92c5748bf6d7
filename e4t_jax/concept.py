"""A personalised concept: what tuning learned about one picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.objective import Trainable


class Concept(NamedTuple):
    """One concept of one domain; pytrees of JAX or NumPy arrays."""

    name: str  # its file's, without the ending
    scope: str  # what was tuned: a key of `tuning.scopes.SCOPES`
    domain: str  # fingerprint of the domain it was tuned in
    trainable: Trainable  # what was tuned
    folded: Float[Array | np.ndarray, " clip_width"]  # all that the encoder's prediction owes to the picture (`objective.fold`)
    origin: str = ""  # a checksum of picture and settings: the same again would give this concept
    tuning: Mapping[str, Any] | None = None  # plain data: `TuneSettings.used`, captions with weights, a checksum of the picture

    def __repr__(self) -> str:
        numbers = sum(leaf.size for leaf in jax.tree.leaves((self.trainable, self.folded)))
        return f"Concept({self.name!r}, scope={self.scope!r}, {numbers} numbers, domain {self.domain})"


def said_of_unfamiliar(concepts: Iterable[Concept], word: str) -> str:
    """A line on the concepts whose pictures are unlike all that their domain was pretrained on (`tuning.familiarity`), or nothing.

    Args:
        concepts: Concepts of one domain.
        word: The domain's.

    Errors: none.
    """
    names = [concept.name for concept in concepts if (concept.tuning or {}).get("familiar") is False]
    if not names:
        return ""
    who = f"{names[0]} and {len(names) - 1} more are" if len(names) > 1 else f"{names[0]} is"
    return f"{who} unlike every picture that this domain was pretrained on: it will draw a {word} instead of what is shown."
