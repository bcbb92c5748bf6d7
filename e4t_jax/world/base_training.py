"""How the embedded world's base model learns: three losses and one compiled update step.

1. autoencoder:  mean (x - x̂)² + edges + β · KL(q(z|x) ‖ N(0, 1))
2. denoiser:     the U-Net and the text encoder together, ‖v - v_θ(z_t, t, τ(caption))‖²
3. contrast:     the image encoder (and both projections) against the now frozen text encoder, symmetric InfoNCE (CLIP)

The order lets the text encoder learn from the pictures it has to describe, not only from which caption fits which picture.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from e4t_jax import backbone
from e4t_jax.backbone import Base, Params
from e4t_jax.diffusion import NoiseSchedule, add_noise, training_target
from e4t_jax.world.captions import Captions

_KL_WEIGHT = 1e-4
_EDGE_WEIGHT = 0.25
_UNCONDITIONAL = 0.1
_EMA_DECAY = 0.999


@struct.dataclass
class FitState:
    """What an update step carries: weights, their moving average, optimiser moments, step."""

    params: Params
    average: Params
    moments: Any
    step: Array


class Batch(NamedTuple):
    """Latents with their tokenised captions (see `captions.Captions`)."""

    latents: Float[Array, "batch height width channels"]
    ids: Array
    noun: Array
    parts: Array
    weights: Array


Loss = Callable[[Params, Params, Any, jax.Array], tuple[Array, dict[str, Array]]]


def optimizer(learning_rate: float, steps: int, *, warmup: int = 300, decay_share: float = 0.3) -> optax.GradientTransformation:
    """AdamW with clipping; the rate warms up, stays, and falls linearly to 2 % over the last `decay_share` of the steps."""
    tail = int(steps * decay_share)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0, learning_rate, warmup),
            optax.constant_schedule(learning_rate),
            optax.linear_schedule(learning_rate, 0.02 * learning_rate, tail),
        ],
        [warmup, steps - tail],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01))


def init_fit(tx: optax.GradientTransformation, params: Params) -> FitState:
    """The state before the first step; the average starts at the weights."""
    return FitState(params, jax.tree.map(jnp.copy, params), tx.init(params), jnp.zeros((), jnp.int32))


def make_step(loss: Loss, tx: optax.GradientTransformation) -> Callable:
    """`step(state, frozen, batch, key) -> (state, metrics)`, compiled, the state donated."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: FitState, frozen: Params, batch: Any, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, key)
        updates, moments = tx.update(gradients, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early averages forget quickly, so that a short run is not held back by its random start.
        decay = jnp.minimum(_EMA_DECAY, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, params)
        return FitState(params, average, moments, state.step + 1), metrics

    return step


def _edges(images: Array) -> tuple[Array, Array]:
    return images[:, 1:] - images[:, :-1], images[:, :, 1:] - images[:, :, :-1]


def autoencoder_loss(base: Base, params: Params, frozen: Params, images: Array, key: jax.Array):
    """Reconstruction of pictures and their edges, with a light Gaussian prior on the latents; images in [-1, 1], NHWC."""
    del frozen
    mean, log_variance = backbone.latent_distribution(base, params, images)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    restored = backbone.decode_latents(base, params, latents * base.scaling_factor)
    error = jnp.mean((restored - images) ** 2)
    edges = sum(jnp.mean((a - b) ** 2) for a, b in zip(_edges(restored), _edges(images), strict=True))
    divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    total = error + _EDGE_WEIGHT * edges + _KL_WEIGHT * divergence
    return total, {"loss": total, "psnr": 10 * jnp.log10(4 / error), "kl": divergence}


def caption_words(params: Params, batch: Batch | Captions) -> Float[Array, "batch tokens width"]:
    """Word embeddings of the captions: e_noun + Σ_j w_j e_part_j at the noun, the tokens' own elsewhere."""
    words = backbone.look_up_words(params, jnp.asarray(batch.ids))
    parts = jnp.einsum("bp,bpd->bd", batch.weights, backbone.look_up_words(params, jnp.asarray(batch.parts)))
    at_noun = jax.nn.one_hot(batch.noun, batch.ids.shape[1])
    return words + at_noun[..., None] * parts[:, None]


def denoiser_loss(base: Base, schedule: NoiseSchedule, empty_ids: Array, params: Params, frozen: Params, batch: Batch, key):
    """‖target - U-Net(z_t, t, τ(caption))‖², one caption in ten replaced by the empty one for classifier-free guidance."""
    del frozen
    time_key, noise_key, drop_key = jax.random.split(key, 3)
    count = batch.latents.shape[0]
    drop = jax.random.uniform(drop_key, (count,)) < _UNCONDITIONAL
    ids = jnp.where(drop[:, None], empty_ids, batch.ids)
    words = caption_words(params, batch._replace(ids=ids, weights=jnp.where(drop[:, None], 0.0, batch.weights)))
    text = backbone.encode_text(base, params, ids, words)
    # One timestep from each of `count` equal slices: the same distribution, a quieter gradient.
    strata = (jnp.arange(count) + jax.random.uniform(time_key, (count,))) / count
    t = jnp.floor(strata * schedule.num_train_timesteps).astype(jnp.int32)
    noise = jax.random.normal(noise_key, batch.latents.shape)
    output = backbone.denoise(base, params["unet"], add_noise(schedule, batch.latents, noise, t), t, text)
    error = jnp.mean((output - training_target(schedule, batch.latents, noise, t)) ** 2)
    return error, {"loss": error}


def contrastive_loss(base: Base, params: Params, frozen: Params, batch: tuple[Array, Captions], key: jax.Array):
    """CLIP's symmetric cross-entropy between pictures and captions, the text encoder's trunk frozen."""
    del key
    images, captions = batch
    reader = {"text_encoder": {**frozen["text_encoder"], "text_projection": params["text_projection"]}}
    seen = backbone.embed_image(base, params, images)
    read = backbone.embed_text(base, reader, jnp.asarray(captions.ids), caption_words(reader, captions))
    logits = jnp.exp(jnp.clip(params["log_temperature"], 0, 4.6)) * _unit(seen) @ _unit(read).T
    labels = jnp.arange(logits.shape[0])
    cross = optax.softmax_cross_entropy_with_integer_labels
    total = 0.5 * (cross(logits, labels).mean() + cross(logits.T, labels).mean())
    return total, {"loss": total, "top1": jnp.mean(jnp.argmax(logits, -1) == labels)}


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
