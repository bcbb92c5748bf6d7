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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.bases.protocol import Params
from e4t_jax.checks import Guidance, SamplingSteps, Seed, check_ranges
from e4t_jax.objective import Frozen, Method, Trainable, concept_word, effective_unet, empty_states, own_reader, prompt_states
from e4t_jax.samplers import Sampler


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How pictures are drawn."""

    seed: Seed = 0
    """Seed of the noise."""
    steps: SamplingSteps = 25
    """Sampling steps."""
    guidance: Guidance | None = None
    """Classifier-free guidance, 1 is none; the domain's own where not given."""
    sampling: str | None = None
    """Sampler: ddim, dpm++2m, pndm, euler or euler-ancestral; the base's own where not given."""

    def check(self) -> None:
        """Errors: `UserError` for numbers out of range."""
        check_ranges(self)


@struct.dataclass
class Drawing:
    """What all concepts of a call share."""

    method: Method
    sampler: Sampler
    frozen: Frozen
    vae: Params
    ids: Int[Array, "prompts length"]
    placeholder: Bool[Array, "prompts length"]
    noise: Float[Array, "prompts height width channels"]
    guidance: float | Float[Array, ""]
    key: PRNGKeyArray


class DrawnConcept(NamedTuple):
    """What drawing needs of one concept."""

    trainable: Trainable
    folded: Float[Array | np.ndarray, " clip_width"]


def sample_latents(
    run: Drawing, concept: DrawnConcept
) -> tuple[Float[Array, "prompts height width channels"], Float[Array, "steps prompts text_width"]]:
    """Latents of one concept in several prompts, and the words e* that were used on the way.

    Pure, so that `jit` and `vmap` over concepts apply.
    """
    method, frozen, sampler = run.method, own_reader(concept.trainable, run.frozen), run.sampler
    unet = effective_unet(concept.trainable, frozen)
    count = len(run.noise)
    empty = empty_states(method, frozen, count)
    folded = jnp.broadcast_to(concept.folded, (count, *concept.folded.shape))

    def call(state, i):
        z, t = state.latents, jnp.broadcast_to(sampler.timesteps[i], (count,))
        unconditional, features = method.base.denoise(unet, z, t, empty)
        word = concept_word(method, concept.trainable, frozen, folded, features).embedding
        text = prompt_states(method, frozen, run.ids, run.placeholder, word)
        conditional = method.base.denoise(unet, z, t, text)[0]
        return sampler.step(state, unconditional + run.guidance * (conditional - unconditional), i), word

    state, words = jax.lax.scan(call, sampler.init(run.noise, run.key), jnp.arange(len(sampler.timesteps)))
    return state.latents, words


def draw_concept(run: Drawing, concept: DrawnConcept) -> Float[Array, "prompts h w 3"]:
    """One concept in every prompt, decoded to pictures in [-1, 1]; over many concepts: `tuning.batching`."""
    latents, _ = sample_latents(run, concept)
    return jnp.clip(run.method.base.decode(run.vae, latents), -1, 1)
