"""Batches for domain pretraining, in an order that depends on the seed alone, addressed by number.

A row is `image` (float32 `[size, size, 3]` in [-1, 1]), `mask` (float32 `[size, size]`, ones where there is none),
`ids` and `placeholder` (a tokenised prompt). A resumed run reads on where it stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from e4t_jax.data.prefetch import read_ahead
from e4t_jax.data.sources import Broken
from e4t_jax.errors import UserError

if TYPE_CHECKING:
    import grain.python as grain

Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


def training_batches(
    pictures: grain.MapDataset,
    tokenize: Tokenize,
    prompts: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    first: int = 0,
    last: int,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
    broken: Broken | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Shuffled batches `first` … `last - 1`; the prompt is the row's caption or a draw from `prompts`.

    Of every batch, `share` = (i, n) reads the i-th of n parts and no other: the n parts, one after the other, are the batch,
    whatever n is. `workers` are processes that read ahead (`data.prefetch.read_ahead`); the batches do not depend on their number.
    `broken` is told of the pictures that could not be read.

    Errors: `UserError` when there are fewer pictures than a batch holds, and when n does not divide a batch.
    """
    if len(pictures) < batch_size:
        raise UserError(f"{batch_size} is more than the {len(pictures)} pictures of the data; lower it.", "batch_size")
    which, shares = share
    if batch_size % shares:
        raise UserError(f"{batch_size} does not divide by {shares} processes; choose a multiple of {shares}.", "batch_size")
    # As often as it takes, not for ever: the length of what never ends overflows where a batch is one picture.
    epochs = -(-last * batch_size // len(pictures))
    rows = (
        pictures.seed(seed)
        .shuffle()
        .repeat(epochs)
        .random_map(partial(_add_prompt, tokenize, prompts, {}))
        .batch(batch_size // shares)
    )
    own = rows[first * shares + which : last * shares : shares]
    return _met(broken or Broken(), read_ahead(own, workers, 2 * max(workers, 2)))


def _met(broken: Broken, batches: Generator[dict[str, np.ndarray], None, None]) -> Iterator[dict[str, np.ndarray]]:
    with contextlib.closing(batches):
        for batch in batches:
            yield broken.meet(batch)


def _add_prompt(
    tokenize: Tokenize,
    prompts: Sequence[str],
    tokens: dict[str, tuple[np.ndarray, np.ndarray]],
    row: dict[str, Any],
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """A row with its prompt's tokens, in its caption's stead; `tokens` keeps those of prompts that were met before."""
    prompt = row.pop("caption", None) or prompts[int(generator.integers(len(prompts)))]
    if prompt not in tokens:
        ids, placeholder = tokenize([prompt])
        tokens[prompt] = ids[0], placeholder[0]
    return {**row, "ids": tokens[prompt][0], "placeholder": tokens[prompt][1]}
