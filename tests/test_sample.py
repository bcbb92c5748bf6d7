"""Generation: the word is predicted anew at every step, and concepts do not disturb each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.objective import Trainable
from e4t_jax.sample import Drawing, Personal, draw, sample_latents
from e4t_jax.samplers import sampler


def draw_inputs(domain, concepts):
    ids, placeholder = domain.tokenize(["a photo of *s", "*s in the snow"])
    folded = jax.random.normal(jax.random.key(0), (concepts, domain.base.clip_width))
    noise = jax.random.normal(jax.random.key(1), (2, *domain.base.latent_shape))
    return folded, jnp.asarray(ids), jnp.asarray(placeholder), noise


@pytest.mark.compiles
def test_the_word_changes_over_the_sampling_steps(domain):
    folded, ids, placeholder, noise = draw_inputs(domain, 1)
    ddim = sampler(domain.method.schedule, "ddim", 4)
    _, words = jax.jit(sample_latents)(
        domain.method, ddim, Trainable(), domain.frozen, folded[0], ids, placeholder, noise, 3.0, jax.random.key(0)
    )
    assert words.shape == (4, 2, domain.base.text_width)
    for earlier, later in itertools.pairwise(words):
        assert np.abs(later - earlier).max() > 1e-5


@pytest.mark.compiles
def test_concepts_drawn_together_are_the_concepts_drawn_alone(domain):
    """Maximum difference 1e-4 in pictures of [-1, 1]."""
    folded, ids, placeholder, noise = draw_inputs(domain, 2)
    dpm = sampler(domain.method.schedule, "dpm++2m", 3)

    run = Drawing(domain.method, dpm, domain.frozen, domain.params["vae"], ids, placeholder, noise, 3.0, jax.random.key(0))
    both = Personal(Trainable(), folded)
    together = jax.jit(jax.vmap(draw, in_axes=(None, 0)))(run, both)
    assert together.shape == (2, 2, domain.base.image_size, domain.base.image_size, 3)
    np.testing.assert_allclose(together[0], jax.jit(draw)(run, Personal(Trainable(), folded[0])), atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 1e-3
