"""Generation: the word is predicted anew at every step, and concepts do not disturb each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.concept import Concept
from e4t_jax.objective import Trainable
from e4t_jax.sample import Drawing, DrawnConcept, draw_concept, draw_prompt_noise, sample_latents
from e4t_jax.samplers import sampler


def drawing(domain, steps, concepts):
    """Two prompts to draw some concepts in, and their folded pictures."""
    ids, placeholder = domain.tokenize(["a photo of *s", "*s in the snow"])
    folded = jax.random.normal(jax.random.key(0), (concepts, domain.base.image_encoder.width))
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
        keys=jax.random.split(jax.random.key(0), 2),
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


def test_a_prompt_has_its_noise_in_any_company_and_order():
    """Of a seed, the text and how often it came before, and of nothing else; equal to the last bit."""
    shape = (2, 3, 4)
    alone = draw_prompt_noise(0, ["a"], shape)
    many = draw_prompt_noise(0, ["b", "a", "c", "a"], shape)
    np.testing.assert_array_equal(many.start[1], alone.start[0])
    np.testing.assert_array_equal(jax.random.key_data(many.keys[1]), jax.random.key_data(alone.keys[0]))
    np.testing.assert_array_equal(many.start[3], draw_prompt_noise(0, ["a", "a"], shape).start[1])
    apart = [*many.start, *draw_prompt_noise(1, ["a"], shape).start]
    assert all(np.abs(one - other).max() > 0.1 for one, other in itertools.combinations(apart, 2))
    assert abs(float(draw_prompt_noise(0, ["a"], (64, 64, 4)).start.std()) - 1) < 0.02


@pytest.mark.compiles
@pytest.mark.parametrize("sampling", ["ddim", "euler-ancestral"])
def test_a_prompt_gives_its_picture_in_any_company_and_under_any_generator_setting(domain, sampling):
    """1/255, as uint8."""
    folded = np.asarray(jax.random.normal(jax.random.key(0), (domain.base.image_encoder.width,)))
    concept = Concept("venus", "compact", domain.fingerprint, Trainable(), folded)
    prompts = ["*s in the snow", "a photo of *s", "*s at night"]

    def draw(*prompts):
        return domain.generate([concept], prompts, steps=3, sampling=sampling)[0].astype(int)

    together = draw(*prompts)
    assert np.abs(draw(*prompts[::-1])[::-1] - together).max() <= 1
    assert np.abs(draw(prompts[1])[0] - together[1]).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1
    with jax.threefry_partitionable(False):
        assert np.abs(draw(prompts[1])[0] - together[1]).max() <= 1
