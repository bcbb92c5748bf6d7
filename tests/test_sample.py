"""Generation: the word is predicted anew at every step, and concepts do not disturb each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.objective import Trainable
from e4t_jax.sample import Drawing, DrawnConcept, draw_concept, sample_latents
from e4t_jax.samplers import sampler


def drawing(domain, steps, concepts):
    """Two prompts to draw some concepts in, and their folded pictures."""
    ids, placeholder = domain.tokenize(["a photo of *s", "*s in the snow"])
    folded = jax.random.normal(jax.random.key(0), (concepts, domain.base.clip_width))
    noise = jax.random.normal(jax.random.key(1), (2, *domain.base.latent_shape))
    return Drawing(
        method=domain.method,
        sampler=steps,
        frozen=domain.frozen,
        vae=domain.params["vae"],
        ids=jnp.asarray(ids),
        placeholder=jnp.asarray(placeholder),
        noise=noise,
        guidance=3.0,
        key=jax.random.key(0),
    ), folded


@pytest.mark.compiles
def test_the_word_changes_over_the_sampling_steps(domain):
    run, folded = drawing(domain, sampler(domain.method.schedule, "ddim", 4), 1)
    _, words = jax.jit(sample_latents)(run, DrawnConcept(Trainable(), folded[0]))
    assert words.shape == (4, 2, domain.base.text_width)
    for earlier, later in itertools.pairwise(words):
        assert np.abs(later - earlier).max() > 1e-5


@pytest.mark.compiles
def test_concepts_drawn_together_are_the_concepts_drawn_alone(domain):
    """Maximum difference 1e-4 in pictures of [-1, 1]."""
    run, folded = drawing(domain, sampler(domain.method.schedule, "dpm++2m", 3), 2)
    together = jax.jit(jax.vmap(draw_concept, in_axes=(None, 0)))(run, DrawnConcept(Trainable(), folded))
    assert together.shape == (2, 2, domain.base.image_size, domain.base.image_size, 3)
    np.testing.assert_allclose(together[0], jax.jit(draw_concept)(run, DrawnConcept(Trainable(), folded[0])), atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 1e-3
