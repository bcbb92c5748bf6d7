"""The loss on pictures that are held out of learning, always at the same timesteps and noise: no luck in what falls."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e4t_jax.arrays import Array
from e4t_jax.objective import Draws, Method, Trainable, draw, e4t_loss_at
from e4t_jax.pretraining.step import Given, concept_batch

_KEY = 7


def validation_loss(
    method: Method, clip_features: str, trainable: Trainable, given: Given, rows: dict[str, np.ndarray], most: int
) -> float:
    """The E4T loss of rows of `data.batches` without λ's term, up to `most` of them at once; on one device of this process.

    The number does not depend on `most`: the draws are those of all rows, and the mask is weighed over all of them.
    """
    count = len(rows["ids"])
    each = max(size for size in range(1, min(most, count) + 1) if count % size == 0)
    draws, mean_mask = draw(method, count, jax.random.key(_KEY)), jnp.mean(rows["mask"], dtype=jnp.float32)
    total = 0.0
    for first in range(0, count, each):
        share, its_draws = jax.tree.map(lambda leaf, first=first: leaf[first : first + each], (rows, draws))
        total += float(_loss(clip_features, method, trainable, given, share, its_draws, mean_mask))
    return total * each / count


@partial(jax.jit, static_argnums=0)
def _loss(
    clip_features: str, method: Method, trainable: Trainable, given: Given, rows: dict[str, Any], draws: Draws, mean_mask: Array
) -> Array:
    batch = concept_batch(method, clip_features, given.encoders, rows)
    return e4t_loss_at(method, trainable, given.frozen, batch, *draws, regularisation=0.0, mean_mask=mean_mask)[0]
