"""Batches for domain pretraining, in an order that depends on the seed alone, addressed by number.

A row is `image` (float32 `[size, size, 3]` in [-1, 1]), `mask` (float32 `[size, size]`, ones where there is none),
`ids` and `placeholder` (a tokenised prompt). A resumed run reads on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from e4t_jax.errors import UserError

if TYPE_CHECKING:
    import grain.python as grain

Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


def training_batches(
    pictures: grain.MapDataset,
    tokenize: Tokenize,
    prompts: Sequence[str],
    batch_size: int,
    seed: int,
    *,
    first: int = 0,
    last: int,
    share: tuple[int, int] = (0, 1),
    workers: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Shuffled batches `first` … `last - 1`; the prompt is the row's caption or a draw from `prompts`.

    Of every batch, `share` = (i, n) reads the i-th of n parts and no other: the n parts, one after the other, are the batch,
    whatever n is. `workers` threads read ahead; the batches do not depend on their number.

    Errors: `UserError` when there are fewer pictures than a batch holds, and when n does not divide a batch.
    """
    import grain.python as grain

    if len(pictures) < batch_size:
        raise UserError(f"{batch_size} is more than the {len(pictures)} pictures of the data; lower it.", "batch_size")
    which, shares = share
    if batch_size % shares:
        raise UserError(f"{batch_size} does not divide by {shares} processes; choose a multiple of {shares}.", "batch_size")
    tokens: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add_prompt(row: dict[str, Any], generator: np.random.Generator) -> dict[str, np.ndarray]:
        prompt = row.pop("caption", None) or prompts[int(generator.integers(len(prompts)))]
        if prompt not in tokens:
            ids, placeholder = tokenize([prompt])
            tokens[prompt] = ids[0], placeholder[0]
        return {**row, "ids": tokens[prompt][0], "placeholder": tokens[prompt][1]}

    # As often as it takes, not for ever: the length of what never ends overflows where a batch is one picture.
    epochs = -(-last * batch_size // len(pictures))
    rows = pictures.seed(seed).shuffle().repeat(epochs).random_map(add_prompt).batch(batch_size // shares)
    own = rows[first * shares + which : last * shares : shares]
    ahead = own.to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers))
    return iter(ahead)
