"""What a picture shows around its concept, told by the denoiser itself.

Tuning on a bare picture needs a caption: under a prompt that says neither place nor medium, the word has to swallow both.
The base model knows a caption that fits from one that does not, since it denoises better under it: a text-to-image model is
a classifier of pictures (Li et al. 2023, arXiv 2303.16203). With e* the encoder's word of the picture, d draws of (t, ε)
that all captions share, and the error

    err_c,d = mean (target_d - U-Net_θ'(z_t_d, t_d, τ(caption_c(e*))))²

let b be the caption with the least mean error. Captions that the draws cannot tell from b share the weight with it:

    δ_c = mean_d (err_c,d - err_b,d)        its standard error s_c = std_d / sqrt(draws)
    weight_c ∝ exp(-½ (δ_c / s_c)²)

No weights are needed but the base's own: it works for photographs and Stable Diffusion as for any other base.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.objective import Frozen, Method, Trainable, add_to_domain_word, effective_unet, predict_of_one, prompt_states
from e4t_jax.process import add_noise, draw_noise, training_target

# Timesteps, as shares of the schedule, at which the noise hides details and leaves place and medium open.
_FROM, _TO = 0.3, 0.8


def caption_error(
    method: Method,
    frozen: Frozen,
    latents: Float[Array, "height width channels"],
    clip: Float[Array, "layers clip_width"],
    key: PRNGKeyArray,
    draws: int,
) -> Callable[[Int[Array, " length"], Bool[Array, " length"]], Float[Array, " draws"]]:
    """err of the module's head for one picture, as a function of the caption; all see the same timesteps, noise and word."""
    share = _FROM + (_TO - _FROM) * (jnp.arange(draws) + 0.5) / draws
    t = jnp.floor(share * method.schedule.num_train_timesteps).astype(jnp.int32)
    noise = draw_noise(key, (draws, *latents.shape))
    z0 = jnp.broadcast_to(latents, noise.shape)
    z_t = add_noise(method.schedule, z0, noise, t)
    target = training_target(method.schedule, z0, noise, t)
    unet = effective_unet(Trainable(), frozen)
    word = add_to_domain_word(method, Trainable(), frozen, predict_of_one(method, frozen, unet, z_t, t=t, clip=clip)).embedding

    def error(ids: Int[Array, " length"], placeholder: Bool[Array, " length"]) -> Float[Array, " draws"]:
        own_ids, own_placeholder = (jnp.broadcast_to(part, (draws, *part.shape)) for part in (ids, placeholder))
        text = prompt_states(method, frozen, own_ids, own_placeholder, word)
        return jnp.mean((method.base.denoise(unet, z_t, t, text)[0] - target) ** 2, axis=(1, 2, 3))

    return error


def caption_weights(errors: Float[Array, "captions draws"]) -> Float[Array, " captions"]:
    """The share of each caption, summing to 1: all of it for the best, unless others cannot be told from it."""
    excess = errors - errors[_best(errors)]
    deviation = excess.std(axis=1, ddof=1) / jnp.sqrt(errors.shape[1])
    distance = excess.mean(axis=1) / jnp.maximum(deviation, 1e-12)
    return jax.nn.softmax(-0.5 * distance**2)


def read_scene(
    method: Method,
    frozen: Frozen,
    latents: Float[Array, "height width channels"],
    clip: Float[Array, "layers clip_width"],
    ids: Int[Array, "media places length"],
    placeholder: Bool[Array, "media places length"],
    key: PRNGKeyArray,
    draws: int = 4,
) -> Float[Array, "media places"]:
    """The weight of every caption for one picture, found by turns: a medium (at the first place), the place, the medium again.

    2 media + places captions are tried instead of media × places. The first guess may be off, where the first place is
    wrong; places are told apart even then.
    """
    error = caption_error(method, frozen, latents, clip, key=key, draws=draws)
    media, places = ids.shape[:2]

    def attempt(errors: Array, turn: Array) -> tuple[Array, None]:
        guess, found = _best(errors[:media]), _best(errors[media : media + places])
        later = turn - media - places
        medium = jnp.where(turn < media, turn, jnp.where(later < 0, guess, later))
        place = jnp.where(turn < media, 0, jnp.where(later < 0, turn - media, found))
        return errors.at[turn].set(error(ids[medium, place], placeholder[medium, place])), None

    # One after the other: memory stays that of a single caption, however long the list, and one U-Net is compiled for all.
    turns = jnp.arange(2 * media + places)
    errors, _ = jax.lax.scan(attempt, jnp.zeros((len(turns), draws)), turns)
    return caption_weights(errors[media + places :])[:, None] * caption_weights(errors[media : media + places])


def _best(errors: Float[Array, "captions draws"]) -> Int[Array, ""]:
    return jnp.argmin(errors.mean(axis=1))


def pick_captions(weights: Float[Array, "media places"], count: int) -> Int[Array, " count"]:
    """`count` captions, as flat indices, each as often as its weight says: at equal steps along the summed weights."""
    ends = jnp.cumsum(weights.ravel())
    return jnp.searchsorted(ends, (jnp.arange(count) + 0.5) / count * ends[-1])
