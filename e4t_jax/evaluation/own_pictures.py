"""A user's own pictures in any domain: what it draws of each after no steps of tuning, a few, and more; a grid for each picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from e4t_jax.concept import Concept
from e4t_jax.data.grids import picture_grid
from e4t_jax.data.images import read_image, to_uint8
from e4t_jax.domain import Domain
from e4t_jax.sample import SampleSettings
from e4t_jax.tuning.tune import TuneSettings

_TILE = 256  # pixels a side in the grid, about


class DrawnSteps(NamedTuple):
    """One picture given, its concepts, and what they are drawn as, by steps of tuning."""

    given: UInt8[np.ndarray, "h w 3"]
    concepts: dict[int, Concept]
    pictures: dict[int, UInt8[np.ndarray, "prompts h w 3"]]


def draw_steps(
    domain: Domain,
    images: Sequence[Path],
    prompts: Sequence[str],
    drawing: SampleSettings,
    *,
    steps: Sequence[int] = (0, 5, 15),
    bars: Callable[[str], Callable[[Iterable], Iterable]] = lambda name: iter,
) -> list[DrawnSteps]:
    """Tunes a concept for each picture and each number of steps, and draws it in all prompts, from the same noise.

    Args:
        domain: Where they are tuned.
        images: Picture files.
        prompts: With `*s` in each.
        drawing: How pictures are drawn; tuning has the same seed.
        steps: Numbers of tuning steps; 0 is the encoder alone.
        bars: Name of a part of the work -> what wraps its loop.

    Errors: `UserError` as `Domain.tune` and `Domain.generate`.
    """
    size = domain.base.image_size
    drawn = [DrawnSteps(to_uint8(read_image(image, size, use_mask=False)[0]), {}, {}) for image in images]
    for number in steps:
        settings = TuneSettings(steps=number, seed=drawing.seed)
        concepts = domain.tune(images, settings, track=bars(f"tuning, {number} steps"))
        pictures = domain.generate(concepts, prompts, drawing, track=bars(f"drawing, {number} steps"))
        for one, concept, own in zip(drawn, concepts, pictures, strict=True):
            one.concepts[number] = concept
            one.pictures[number] = own
    return drawn


def step_grid(drawn: DrawnSteps, prompts: Sequence[str], heading: str) -> UInt8[np.ndarray, "height width 3"]:
    """A row for each prompt: the picture given, and what is drawn after each number of steps."""
    titles = ["given", *("encoder alone" if number == 0 else f"{number} steps" for number in drawn.pictures)]
    rows = [[drawn.given, *(pictures[row] for pictures in drawn.pictures.values())] for row in range(len(prompts))]
    size = len(drawn.given)
    # Small pictures are magnified by whole pixels, large ones shrunk.
    return picture_grid(rows, titles=titles, labels=prompts, heading=heading, side=max(1, _TILE // size) * min(size, _TILE))
