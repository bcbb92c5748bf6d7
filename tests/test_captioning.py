"""Captions read off a bare picture: the errors against a plain loop, the weights against their formula, the shipped world."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.captioning import caption_error, caption_weights, pick_captions, read_scene
from e4t_jax.creatures.judging.personalisation_trial import held_out
from e4t_jax.creatures.world.attributes import CONTEXTS, STYLES
from e4t_jax.creatures.world.pictures import as_floats
from e4t_jax.files.domain_files import load_domain
from e4t_jax.objective import ConceptBatch, Draws, LossWeights, Trainable, e4t_loss_at
from e4t_jax.templates import SCENES, TEMPLATES, scene_captions

OPTIMISED = True  # the shipped domain computes for long


@pytest.mark.compiles
def test_errors_are_the_losses_of_the_captions(domain, concept_batch):
    """err_c,d is the E4T loss without its regulariser, at the same timestep and noise: relative 1e-5; and the captions that
    `read_scene` tries by turns are weighed by those errors."""
    latents, clip = concept_batch.latents[0], concept_batch.clip[0]
    ids, placeholder = concept_batch.ids, concept_batch.placeholder
    key, draws = jax.random.key(3), 2
    error = caption_error(domain.method, domain.frozen, latents, clip, key, draws)
    errors = jax.lax.map(lambda caption: error(*caption), (ids, placeholder))
    assert errors.shape == (4, draws)
    noise = jax.random.normal(key, (draws, *latents.shape))
    timesteps = [425, 675]  # the middles of two halves of 300 … 800
    for row in range(4):
        for draw in range(draws):
            one = ConceptBatch(latents[None], clip[None], ids[row][None], placeholder[row][None])
            t = jnp.array([timesteps[draw]])
            loss, _ = e4t_loss_at(
                domain.method, Trainable(), domain.frozen, one, Draws(t, noise[draw][None]), weights=LossWeights(0.0)
            )
            np.testing.assert_allclose(errors[row, draw], loss, rtol=1e-5)
    grid = [jnp.stack([part, part[::-1]], axis=1) for part in (ids[:3], placeholder[:3])]  # three media, two places
    weights = read_scene(domain.method, domain.frozen, latents, clip, *grid, key, draws)
    of = {(medium, place): errors[[medium, 2 - medium][place]] for medium in range(3) for place in range(2)}
    guess = min(range(3), key=lambda medium: of[medium, 0].mean())
    places = jnp.stack([of[guess, place] for place in range(2)])
    best = int(places.mean(axis=1).argmin())
    media = jnp.stack([of[medium, best] for medium in range(3)])
    np.testing.assert_allclose(weights, caption_weights(media)[:, None] * caption_weights(places), rtol=1e-3)


def test_weights_follow_their_formula():
    """Float64, caption by caption; random errors, relative 1e-5."""
    errors = np.random.default_rng(0).uniform(0.2, 0.3, (6, 5))
    best = np.argmin([np.mean(row) for row in errors])
    raw = []
    for row in errors:
        excess = row - errors[best]
        deviation = np.sqrt(np.sum((excess - excess.mean()) ** 2) / 4) / np.sqrt(5)
        raw.append(1.0 if np.allclose(excess, 0) else np.exp(-0.5 * (excess.mean() / deviation) ** 2))
    weights = caption_weights(jnp.asarray(errors, jnp.float32))
    np.testing.assert_allclose(weights, np.array(raw) / np.sum(raw), rtol=1e-4)


def test_weights_of_one_clear_caption_and_of_twins():
    clear = jnp.array([[0.30, 0.31, 0.30], [0.20, 0.21, 0.205], [0.35, 0.34, 0.36]])
    np.testing.assert_allclose(caption_weights(clear), [0, 1, 0], atol=1e-3)
    twins = jnp.array([[0.20, 0.21, 0.22], [0.22, 0.21, 0.20], [0.9, 0.8, 0.9]])
    np.testing.assert_allclose(caption_weights(twins), [0.5, 0.5, 0], atol=1e-3)


def test_captions_are_picked_as_often_as_their_weight_says():
    weights = jnp.array([[0.5, 0.0], [0.25, 0.25]])
    assert np.bincount(pick_captions(weights, 8), minlength=4).tolist() == [4, 0, 2, 2]


@pytest.mark.compiles
def test_place_and_medium_are_read_off_pictures_in_any_style():
    """The shipped world, 24 validation pictures: at least 23 captions right (chance is one in 40)."""
    creatures, trial = load_domain("creatures"), held_out(4, 24, split="validation", any_style=True)
    captions = [one for row in scene_captions("creature") for one in row]
    ids, placeholder = (jnp.asarray(part).reshape(len(STYLES), len(CONTEXTS), -1) for part in creatures.tokenize(captions))
    pictures = as_floats(trial.pictures)
    latents = creatures.base.encode(creatures.params["vae"], jnp.asarray(pictures))
    clip = creatures.base.image_encoder.see(creatures.params["image_encoder"], pictures)

    @jax.jit
    def read(latents, clip):
        return jax.vmap(lambda *own: read_scene(creatures.method, creatures.frozen, *own, ids, placeholder, jax.random.key(0)))(
            latents, clip
        )

    weights = np.asarray(read(latents, clip)).reshape(24, -1)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    right = [captions[row] == caption for row, caption in zip(weights.argmax(1), trial.captions, strict=True)]
    assert sum(right) >= 23


@pytest.mark.parametrize("kind", sorted(TEMPLATES))
def test_every_kind_has_captions_with_the_placeholder(kind):
    media, places = SCENES[kind]
    grid = scene_captions(kind)
    assert len(grid) == len(media) and {len(row) for row in grid} == {len(places)}
    flat = [caption for row in grid for caption in row]
    assert len(set(flat)) == len(flat) and all("*s" in caption and "  " not in caption for caption in flat)


def test_captions_of_creatures_are_those_of_their_world():
    assert scene_captions("creature") == [[f"{medium} of *s {place}" for place in CONTEXTS.values()] for medium in STYLES.values()]
