"""What a domain's own pictures look like, learned when pretraining ends: pictures unlike them are told when they are tuned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

from e4t_jax.bases import Base, Params
from e4t_jax.data.prefetch import read_ahead
from e4t_jax.tuning.familiarity import LEAST, MOST, Familiarity, learn_familiarity

if TYPE_CHECKING:
    import grain.python as grain

_AT_ONCE = 32


def familiarity_of(base: Base, image_encoder: Params, pictures: grain.MapDataset, workers: int = 0) -> Familiarity | None:
    """What CLIP sees in pictures spread over the data (`tuning.familiarity`); None where there are too few.

    Args:
        base: The base.
        image_encoder: Its CLIP's weights.
        pictures: Rows with `image`.
        workers: Processes that read them.

    Errors: none of its own.
    """
    count = min(MOST, len(pictures))
    if count < LEAST:
        return None
    spread = pictures[:: max(1, len(pictures) // count)][:count]
    embed = jax.jit(base.image_encoder.embed)
    embeddings, batch = [], []
    for row in read_ahead(spread, workers, 2 * _AT_ONCE):
        batch.append(row["image"])
        if len(batch) == _AT_ONCE:
            embeddings.append(np.asarray(embed(image_encoder, np.stack(batch)), np.float32))
            batch = []
    # What does not fill a batch is left out: nothing is compiled anew for a few more.
    return learn_familiarity(np.concatenate(embeddings))
