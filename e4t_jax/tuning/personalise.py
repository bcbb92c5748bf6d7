"""From a picture to a concept, whole: views, the captions it might have, the steps, the fold; one pure function.

    key            = fold_in(seed, checksum of the picture)
    views, φ_clip  = encode(picture and its augmentations)
    prompts        = the caption given, or those that the base reads off the picture
    Trainable      = tune_one(views, prompts)

All randomness comes from the seed and the picture. So a concept is the same whatever is tuned beside it, in whatever order, and
on however many devices.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, PRNGKeyArray, UInt32

from e4t_jax.arrays import Array
from e4t_jax.captioning import pick_captions, read_scene
from e4t_jax.image_inputs import Encoders
from e4t_jax.objective import Frozen, Method, Trainable, fold
from e4t_jax.tuning.familiarity import Familiarity, distance
from e4t_jax.tuning.recipe import Prompts, Recipe, Views
from e4t_jax.tuning.tune import features_of, tune_one

PROMPTS = 8  # of a picture whose caption is read off it, so that doubt between captions shows


class CaptionGrid(NamedTuple):
    """The captions that a picture may have: `templates.scene_captions`, as tokens."""

    ids: Int[Array, "media places length"]
    placeholder: Bool[Array, "media places length"]


@struct.dataclass
class Personalising:
    """What all pictures of a run share."""

    method: Method
    frozen: Frozen
    encoders: Encoders
    captions: CaptionGrid | None  # where pictures come without
    key: PRNGKeyArray
    recipe: Recipe
    familiarity: Familiarity | None = None


class PictureInput(NamedTuple):
    """One picture at the base's size, with what tuning is told of it."""

    picture: Float[Array | np.ndarray, "h w 3"]
    mask: Float[Array | np.ndarray, "h w"]
    checksum: UInt32[Array | np.ndarray, ""]
    caption: Prompts | None = None  # where it has one of its own: [1, length]
    whole: Float[Array | np.ndarray, "s s 3"] | None = None  # as CLIP sees it, where that is not `picture` (`Domain.clip_squash`)


class Personalised(NamedTuple):
    """A concept before it has a name."""

    trainable: Trainable
    losses: Float[Array | np.ndarray, " steps"]  # before each step
    folded: Float[Array | np.ndarray, " clip_width"]
    caption_weights: Float[Array | np.ndarray, "media places"] | None = None  # of the captions read off the picture
    distance: Float[Array | np.ndarray, ""] | None = None  # of the picture from the domain's (`familiarity.distance`)


jax.export.register_namedtuple_serialization(Personalised, serialized_name="e4t_jax.Personalised")


def picture_input(
    picture: Float[np.ndarray, "h w 3"],
    mask: Float[np.ndarray, "h w"] | None,
    caption: Prompts | None = None,
    whole: Float[np.ndarray, "s s 3"] | None = None,
) -> PictureInput:
    """A picture with its checksum; without a mask, all of it counts."""
    checksum = np.asarray(zlib.crc32(np.ascontiguousarray(picture).tobytes()), np.uint32)
    return PictureInput(picture, np.ones(picture.shape[:2], np.float32) if mask is None else mask, checksum, caption, whole)


def personalise(run: Personalising, own: PictureInput) -> Personalised:
    """The concept of one picture; of no steps, what the encoder alone says."""
    views_key, caption_key, tune_key = jax.random.split(jax.random.fold_in(run.key, own.checksum), 3)
    picture, mask = jnp.asarray(own.picture), jnp.asarray(own.mask)
    whole = None if own.whole is None else jnp.asarray(own.whole)
    views = run.recipe.see(run.method, run.encoders, picture, mask, whole=whole, key=views_key)
    trainable, losses, weights = Trainable(), jnp.zeros(0), None
    if run.recipe.steps:
        prompts = own.caption
        if prompts is None:
            prompts, weights = _read_captions(run, views, caption_key)
        trainable, losses = tune_one(run.method, run.frozen, views, prompts, key=tune_key, recipe=run.recipe)
    folded = fold(run.method, trainable, run.frozen, features_of(run.method, trainable, views)[None])[0]
    finished, far = run.recipe.finish(run.frozen, trainable), None
    if run.familiarity is not None:
        far = distance(run.familiarity, run.method.base.image_encoder.embed(run.encoders.image_encoder, picture[None])[0])
    return Personalised(finished, losses, folded, caption_weights=weights, distance=far)


def _read_captions(run: Personalising, views: Views, key: PRNGKeyArray) -> tuple[Prompts, Float[Array, "media places"]]:
    """The prompts that a picture is tuned under, and the weights of all captions that it might have."""
    assert run.captions is not None, "a picture has no caption, and there is none to choose"
    ids, placeholder = run.captions
    weights = read_scene(run.method, run.frozen, views.latents[0], views.clip, ids, placeholder=placeholder, key=key)
    picked = pick_captions(weights, PROMPTS)
    return (ids.reshape(-1, ids.shape[-1])[picked], placeholder.reshape(-1, placeholder.shape[-1])[picked]), weights
