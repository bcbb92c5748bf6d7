"""How far a picture is from all that a domain was pretrained on, by CLIP's embedding x of it:

    D(x) = sqrt( (x - μ)ᵀ (Σ + ε tr(Σ)/d I)⁻¹ (x - μ) / d )         Mahalanobis distance, d numbers

μ and Σ are mean and covariance of the embeddings of one half of the domain's pictures; the other half, which they never saw, says
how far the domain's own pictures lie. A picture farther than all of those, and a tenth more, is unfamiliar: the domain will draw
something of its own instead. (Lee et al. 2018, arXiv 1807.03888, tell pictures of another kind so.)
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Float32

from e4t_jax.arrays import Array

MOST = 4096  # pictures that suffice
LEAST = 256  # of fewer, nothing is said
_SHRINK = 1e-4  # ε
_BEYOND = 1.1  # times the farthest of the domain's own


@struct.dataclass
class Familiarity:
    """What `distance` measures by, and from where on a picture is unfamiliar."""

    mean: Float32[Array | np.ndarray, " d"]
    precision: Float32[Array | np.ndarray, "d d"]  # (Σ + ε tr(Σ)/d I)⁻¹
    limit: Float32[Array | np.ndarray, ""]


def learn_familiarity(embeddings: Float[np.ndarray, "pictures d"]) -> Familiarity | None:
    """What the embeddings of a domain's pictures tell; None where there are too few.

    Args:
        embeddings: Of different pictures, in any order.

    Errors: none.
    """
    if len(embeddings) < LEAST:
        return None
    known, others = (np.asarray(embeddings[half::2], np.float64) for half in range(2))
    mean, covariance = known.mean(axis=0), np.cov(known.T)
    size = len(mean)
    precision = np.linalg.inv(covariance + _SHRINK * np.trace(covariance) / size * np.eye(size))
    made = Familiarity(mean.astype(np.float32), precision.astype(np.float32), np.zeros((), np.float32))
    farthest = max(float(distance(made, one)) for one in others.astype(np.float32))
    return dataclasses.replace(made, limit=np.asarray(_BEYOND * farthest, np.float32))


def distance(familiarity: Familiarity, embedding: Float[Array | np.ndarray, " d"]) -> Float[Array, ""]:
    """D of the module's head.

    Args:
        familiarity: What the domain knows.
        embedding: CLIP's of a picture.

    Errors: none.
    """
    apart = jnp.asarray(embedding, jnp.float32) - familiarity.mean
    return jnp.sqrt(jnp.maximum(apart @ familiarity.precision @ apart, 0) / len(familiarity.mean))
