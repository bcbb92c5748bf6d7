"""A preview of a domain while it is learned: samples, drawn by the encoder alone beside the pictures given, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from e4t_jax.data.grids import picture_grid
from e4t_jax.data.images import to_uint8
from e4t_jax.domain import Domain
from e4t_jax.templates import scene_captions


class Preview(NamedTuple):
    """What was seen: a grid of samples, and figures by name."""

    grid: UInt8[np.ndarray, "height width 3"]
    figures: dict[str, float]


def prompts_of(template: str) -> list[str]:
    """Three prompts of the kind of captions that a domain has: no place, a place, and another medium."""
    likeliest, other, *_ = scene_captions(template)
    return [likeliest[0], likeliest[len(likeliest) // 2], other[0]]


def draw_samples(
    domain: Domain, pictures: Sequence[UInt8[np.ndarray, "h w 3"]], prompts: Sequence[str]
) -> UInt8[np.ndarray, "pictures prompts size size 3"]:
    """Every picture's concept as the encoder alone predicts it, without a step of tuning, in every prompt; seed 0.

    Errors: `UserError` as `Domain.tune` and `Domain.generate`: a picture that is not finite, above all.
    """
    return domain.generate(domain.tune(pictures, steps=0), prompts, seed=0)


def preview(domain: Domain, pictures: Float[np.ndarray, "pictures h w 3"]) -> Preview:
    """Samples of pictures in [-1, 1] under `prompts_of` the domain's template: a row for each, the picture itself first.

    Errors: as `draw_samples`.
    """
    given, prompts = to_uint8(pictures), prompts_of(domain.template)
    drawn = draw_samples(domain, list(given), prompts)
    rows = [[picture, *row] for picture, row in zip(given, drawn, strict=True)]
    return Preview(picture_grid(rows), {})
