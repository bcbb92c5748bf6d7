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
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, Key

from e4t_jax.arrays import Array, same_generator
from e4t_jax.bases.protocol import Params
from e4t_jax.checks import Guidance, SamplingSteps, Seed, check_ranges
from e4t_jax.objective import Frozen, Method, Trainable, concept_word, effective_unet, empty_states, own_reader, prompt_states
from e4t_jax.process import draw_noise
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
    keys: Key[Array, " prompts"]  # of noise added on the way
    guidance: float | Float[Array, ""]


class PromptNoise(NamedTuple):
    """What is random in the pictures of some prompts."""

    start: Float[Array, "prompts height width channels"]
    keys: Key[Array, " prompts"]  # of noise added on the way


def draw_prompt_noise(seed: int, prompts: Sequence[str], latent_shape: tuple[int, int, int]) -> PromptNoise:
    """Each prompt's own noise, by seed, text and how often the same text came before:

        start key, key = split(fold_in(fold_in(key(seed), checksum(prompt)), occurrence))

    So it does not depend on which prompts are drawn together, nor on their order.

    Args:
        seed: Of all the noise.
        prompts: The prompts' texts.
        latent_shape: (height, width, channels) of the start.
    """
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        own = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), zlib.crc32(prompt.encode()))
        keys.append(jax.random.fold_in(own, seen[prompt]))
        seen[prompt] += 1
    with same_generator():
        starts, ways = jax.vmap(jax.random.split, out_axes=1)(jnp.stack(keys))
        return PromptNoise(jax.vmap(lambda key: draw_noise(key, latent_shape))(starts), ways)


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

    state, words = jax.lax.scan(call, sampler.init(run.noise, run.keys), jnp.arange(len(sampler.timesteps)))
    return state.latents, words


def draw_concept(run: Drawing, concept: DrawnConcept) -> Float[Array, "prompts h w 3"]:
    """One concept in every prompt, decoded to pictures in [-1, 1]; over many concepts: `tuning.batching`."""
    latents, _ = sample_latents(run, concept)
    return jnp.clip(run.method.base.decode(run.vae, latents), -1, 1)
