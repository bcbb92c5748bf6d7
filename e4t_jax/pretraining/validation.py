"""The loss on pictures that are held out of learning, always at the same timesteps and noise: no luck in what falls."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e4t_jax.arrays import Array
from e4t_jax.objective import Draws, LossWeights, Method, Trainable, draw_timesteps_and_noise, e4t_loss_at
from e4t_jax.pretraining.step import FrozenWeights, concept_batch

_KEY = 7


def validation_loss(
    method: Method, trainable: Trainable, weights: FrozenWeights, rows: dict[str, np.ndarray], *, at_once: int
) -> float:
    """The E4T loss of rows of `data.batches` without λ's term, up to `at_once` of them at a time; on one device of this process.

    The number does not depend on `at_once`: the draws are those of all rows, and the mask is weighed over all of them.
    """
    count = len(rows["ids"])
    each = max(size for size in range(1, min(at_once, count) + 1) if count % size == 0)
    draws = draw_timesteps_and_noise(method, count, jax.random.key(_KEY))
    mean_mask = jnp.mean(rows["mask"], dtype=jnp.float32)
    total = 0.0
    for first in range(0, count, each):
        share = jax.tree.map(lambda leaf, first=first: leaf[first : first + each], (rows, draws))
        total += float(_loss(method, trainable, weights, share, mean_mask))
    return total * each / count


@jax.jit
def _loss(
    method: Method, trainable: Trainable, weights: FrozenWeights, share: tuple[dict[str, Any], Draws], mean_mask: Array
) -> Array:
    rows, draws = share
    batch = concept_batch(method, weights.encoders, rows)
    return e4t_loss_at(method, trainable, weights.frozen, batch, draws, weights=LossWeights(0.0), mean_mask=mean_mask)[0]
