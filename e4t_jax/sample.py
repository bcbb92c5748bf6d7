"""Generation: the sampling loop with the concept's word predicted anew at every step (iterative refinement).

At every step i, with z the latents and t the timestep:

    o_∅, φ = U-Net_θ'(z, t, τ(""))            the empty prompt's prediction, and the features seen on the way
    e*     = e_d + s (E(fold, φ) + r)         the word of this concept, here and now
    o_c    = U-Net_θ'(z, t, τ(prompt(e*)))
    o      = o_∅ + g (o_c - o_∅)              classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)

The empty prompt's pass serves guidance and features at once, so a step costs two passes, as without a concept.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.bases.protocol import Params
from e4t_jax.objective import Frozen, Method, Trainable, concept_word, effective_unet, empty_states, prompt_states
from e4t_jax.ranges import check_ranges
from e4t_jax.samplers import Sampler


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How pictures are drawn."""

    STEPS_OF: ClassVar[str] = "sampling"
    seed: int = 0
    """Seed of the noise."""
    steps: int = 25
    """Sampling steps."""
    guidance: float | None = None
    """Classifier-free guidance, 1 is none; the domain's own where not given."""
    sampling: str | None = None
    """Sampler: ddim, dpm++2m, pndm, euler or euler-ancestral; the base's own where not given."""

    def check(self) -> None:
        """Errors: `UserError` for numbers out of range."""
        check_ranges(self)


def sample_latents(
    method: Method,
    sampler: Sampler,
    trainable: Trainable,
    frozen: Frozen,
    folded: Float[Array, " clip_width"],
    ids: Int[Array, "prompts length"],
    placeholder: Bool[Array, "prompts length"],
    noise: Float[Array, "prompts height width channels"],
    guidance: float | Float[Array, ""],
    key: PRNGKeyArray,
) -> tuple[Float[Array, "prompts height width channels"], Float[Array, "steps prompts text_width"]]:
    """Latents of one concept in several prompts, and the words e* that were used on the way.

    `trainable` is the concept's own part, `folded` its folded picture; pure, so `jit` and `vmap` (over concepts) apply.
    """
    unet = effective_unet(trainable, frozen)
    count = noise.shape[0]
    empty = empty_states(method, frozen, count)
    folds = jnp.broadcast_to(folded, (count, *folded.shape))

    def call(state, i):
        z, t = state.latents, jnp.broadcast_to(sampler.timesteps[i], (count,))
        unconditional, features = method.base.denoise(unet, z, t, empty)
        word, _ = concept_word(method, trainable, frozen, folds, features)
        text = prompt_states(method, frozen, ids, placeholder, word)
        conditional = method.base.denoise(unet, z, t, text)[0]
        return sampler.step(state, unconditional + guidance * (conditional - unconditional), i), word

    state, words = jax.lax.scan(call, sampler.init(noise, key), jnp.arange(len(sampler.timesteps)))
    return state.latents, words


@jax.jit
def sample_images(
    method: Method,
    sampler: Sampler,
    trainables: Trainable,
    frozen: Frozen,
    vae: Params,
    folded: Float[Array, "concepts clip_width"],
    ids: Int[Array, "prompts length"],
    placeholder: Bool[Array, "prompts length"],
    noise: Float[Array, "concepts prompts height width channels"],
    guidance: float | Float[Array, ""],
    key: PRNGKeyArray,
) -> Float[Array, "concepts prompts h w 3"]:
    """Every concept in every prompt, decoded to pictures in [-1, 1]: one compiled call, `vmap` over concepts."""

    def one(trainable, fold, own_noise):
        return sample_latents(method, sampler, trainable, frozen, fold, ids, placeholder, own_noise, guidance, key)[0]

    latents = jax.vmap(one)(trainables, folded, noise)
    images = method.base.decode(vae, latents.reshape(-1, *latents.shape[2:]))
    return jnp.clip(images, -1, 1).reshape(*latents.shape[:2], *images.shape[1:])
