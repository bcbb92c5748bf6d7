"""How the embedded world's base model learns: three losses.

1. autoencoder:  mean (x - x̂)² + edges + β · KL(q(z|x) ‖ N(0, 1))
2. denoiser:     the U-Net and the text encoder together, ‖v - v_θ(z_t, t, τ(caption))‖²
3. contrast:     the image encoder (and both projections) against the now frozen text encoder, symmetric InfoNCE (CLIP)

The order lets the text encoder learn from the pictures it has to describe, not only from which caption fits which picture.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.bases import Params, StableDiffusion
from e4t_jax.creatures.world.captions import Captions
from e4t_jax.creatures.world.renderer import IMAGE_SIZE, draw
from e4t_jax.process import NoiseSchedule, add_noise, draw_noise, training_target

Drawn = dict[str, Array]  # a `Record` on a device

_KL_WEIGHT = 1e-4
_EDGE_WEIGHT = 0.25
_UNCONDITIONAL = 0.1


class Batch(NamedTuple):
    """Latents with their tokenised captions (see `captions.Captions`)."""

    latents: Float[Array, "batch height width channels"]
    ids: Array
    noun: Array
    parts: Array
    weights: Array


def _edges(images: Array) -> tuple[Array, Array]:
    return images[:, 1:] - images[:, :-1], images[:, :, 1:] - images[:, :, :-1]


def autoencoder_loss(base: StableDiffusion, params: Params, frozen: Params, images: Array, key: jax.Array):
    """Reconstruction of pictures and their edges, with a light Gaussian prior on the latents; images in [-1, 1], NHWC."""
    del frozen
    mean, log_variance = base.posterior(params["vae"], images)
    latents = mean + jnp.exp(0.5 * log_variance) * draw_noise(key, mean.shape)
    restored = base.decode(params["vae"], latents * base.scaling_factor)
    error = jnp.mean((restored - images) ** 2)
    edges = sum(jnp.mean((a - b) ** 2) for a, b in zip(_edges(restored), _edges(images), strict=True))
    divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    total = error + _EDGE_WEIGHT * edges + _KL_WEIGHT * divergence
    return total, {"loss": total, "psnr": 10 * jnp.log10(4 / error), "kl": divergence}


def caption_words(base: StableDiffusion, text_encoder: Params, batch: Batch | Captions) -> Float[Array, "batch tokens width"]:
    """Word embeddings of the captions: e_noun + Σ_j w_j e_part_j at the noun, the tokens' own elsewhere."""
    words = base.look_up(text_encoder, jnp.asarray(batch.ids))
    parts = jnp.einsum("bp,bpd->bd", batch.weights, base.look_up(text_encoder, jnp.asarray(batch.parts)))
    at_noun = jax.nn.one_hot(batch.noun, batch.ids.shape[1])
    return words + at_noun[..., None] * parts[:, None]


def denoiser_loss(
    base: StableDiffusion, schedule: NoiseSchedule, empty_ids: Array, params: Params, frozen: Params, batch: Batch, key
):
    """‖target - U-Net(z_t, t, τ(caption))‖², one caption in ten replaced by the empty one for classifier-free guidance."""
    del frozen
    time_key, noise_key, drop_key = jax.random.split(key, 3)
    count = batch.latents.shape[0]
    drop = jax.random.uniform(drop_key, (count,)) < _UNCONDITIONAL
    ids = jnp.where(drop[:, None], empty_ids, batch.ids)
    words = caption_words(
        base, params["text_encoder"], batch._replace(ids=ids, weights=jnp.where(drop[:, None], 0.0, batch.weights))
    )
    text = base.read(params["text_encoder"], ids, words)
    # One timestep from each of `count` equal slices: the same distribution, a quieter gradient.
    strata = (jnp.arange(count) + jax.random.uniform(time_key, (count,))) / count
    t = jnp.floor(strata * schedule.num_train_timesteps).astype(jnp.int32)
    noise = draw_noise(noise_key, batch.latents.shape)
    output = base.denoise(params["unet"], add_noise(schedule, batch.latents, noise, t), t, text)[0]
    error = jnp.mean((output - training_target(schedule, batch.latents, noise, t)) ** 2)
    return error, {"loss": error}


def contrastive_loss(base: StableDiffusion, params: Params, frozen: Params, batch: tuple[Drawn, Drawn, Captions], key):
    """CLIP's symmetric cross-entropy between pictures of (identities, scenes), drawn here, and their captions.

    The text encoder's trunk is frozen.
    """
    del key
    identities, scenes, captions = batch
    images = jnp.round(draw(identities, scenes, IMAGE_SIZE)[0] * 255) / 127.5 - 1
    reader = {**frozen["text_encoder"], "text_projection": params["text_projection"]}
    seen = base.image_encoder.embed(params["image_encoder"], images)
    read = base.embed_text(reader, jnp.asarray(captions.ids), caption_words(base, reader, captions))
    logits = jnp.exp(jnp.clip(params["log_temperature"], 0, 4.6)) * _unit(seen) @ _unit(read).T
    labels = jnp.arange(logits.shape[0])
    cross = optax.softmax_cross_entropy_with_integer_labels
    total = 0.5 * (cross(logits, labels).mean() + cross(logits.T, labels).mean())
    return total, {"loss": total, "top1": jnp.mean(jnp.argmax(logits, -1) == labels)}


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
