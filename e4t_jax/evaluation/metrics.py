"""Measures of generated pictures that need no judge but the base's own CLIP: they work in any domain.

A metric is a function from `Drawn` to named figures; adding one to `METRICS` is all it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Num, UInt8

from e4t_jax.arrays import Array
from e4t_jax.bases import Base, Params
from e4t_jax.domain import Domain

_CHUNK = 64


class Drawn(NamedTuple):
    """What was drawn, from what, and as what."""

    domain: Domain
    images: UInt8[np.ndarray, "concepts prompts h w 3"]
    given: UInt8[np.ndarray, "concepts h w 3"]  # the picture of each concept
    prompts: Sequence[str]  # with `*s`


def clip_similarities(drawn: Drawn) -> dict[str, float]:
    """Cosines in the base's CLIP: of pictures with their prompts (`*s` read as the domain's word), and with those given."""
    domain, base = drawn.domain, drawn.domain.base
    count, prompts = drawn.images.shape[:2]
    seen = _embed(domain, drawn.images.reshape(-1, *drawn.images.shape[2:]))
    given = _embed(domain, drawn.given)
    ids = domain.tokenize(drawn.prompts).ids
    read = _unit(np.asarray(base.embed_text(domain.params["text_encoder"], jnp.asarray(ids))))
    return {
        "text_similarity": float(np.mean(np.sum(seen * np.tile(read, (count, 1)), -1))),
        "image_similarity": float(np.mean(np.sum(seen * np.repeat(given, prompts, axis=0), -1))),
    }


METRICS: dict[str, Callable[[Drawn], dict[str, Any]]] = {"clip": clip_similarities}


def measure(drawn: Drawn) -> dict[str, Any]:
    """The figures of all `METRICS`."""
    return {name: value for metric in METRICS.values() for name, value in metric(drawn).items()}


def standard_error(values: Num[np.ndarray, "concepts prompts"] | Bool[np.ndarray, "concepts prompts"], draws: int = 4000) -> float:
    """Of the mean of figures, by the bootstrap over concepts: pictures of one concept are alike, and stay together.

        std over draws of mean(values[rows]), rows ~ concepts with replacement        (Efron 1979)

    Args:
        values: A figure for each picture.
        draws: How often concepts are drawn anew, with a seed of its own.

    Errors: none.
    """
    generator = np.random.default_rng(0)
    rows = generator.integers(0, len(values), (draws, len(values)))
    return float(values.mean(axis=1)[rows].mean(axis=1).std())


def edge_energy(images: UInt8[np.ndarray, "*batch h w 3"]) -> float:
    """Mean squared difference of neighbouring pixels: how sharp pictures are."""
    floats = images.astype(np.float32)
    return sum(float(np.mean(np.diff(floats, axis=axis) ** 2)) for axis in (-3, -2))


def _embed(domain: Domain, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n shared"]:
    part, floats = domain.params["image_encoder"], images.astype(np.float32) / 127.5 - 1
    chunks = (floats[row : row + _CHUNK] for row in range(0, len(floats), _CHUNK))
    return _unit(np.concatenate([np.asarray(_embed_chunk(domain.base, part, chunk)) for chunk in chunks]))


@partial(jax.jit, static_argnames="base")
def _embed_chunk(base: Base, image_encoder: Params, images: Float[Array, "n h w 3"]) -> Float[Array, "n shared"]:
    return base.image_encoder.embed(image_encoder, images)


def _unit(vectors: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
