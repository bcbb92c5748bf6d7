"""The E4T loss: its terms, restated in NumPy, and where its gradients go."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.objective import (
    Draws,
    LossWeights,
    Trainable,
    concept_word,
    draw_timesteps_and_noise,
    e4t_loss,
    e4t_loss_at,
    effective_unet,
    empty_states,
    mean_prediction,
    prompt_states,
)
from e4t_jax.process import add_noise, training_target


@pytest.fixture(scope="module")
def draws(domain, concept_batch):
    noise = jax.random.normal(jax.random.key(5), concept_batch.latents.shape)
    return jnp.array([3, 250, 600, 999]), noise


@pytest.fixture(scope="module")
def trainable(domain):
    return Trainable(domain.factors, domain.encoder)


@pytest.fixture(scope="module")
def frozen(domain):
    return domain.frozen._replace(factors=None, encoder=None)


def squared_length(domain):
    """‖e_d‖²."""
    embeddings = domain.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    return float((np.asarray(embeddings[domain.method.domain_id]) ** 2).sum())


@pytest.mark.compiles
def test_loss_is_the_masked_error_plus_the_regulariser(domain, concept_batch, draws, trainable, frozen):
    """Restated from the formulas in NumPy around the U-Net's own output; relative 1e-5."""
    t, noise = draws
    method, batch = domain.method, concept_batch
    loss, terms = jax.jit(partial(e4t_loss_at, weights=LossWeights(0.1)))(method, trainable, frozen, batch, Draws(t, noise))
    alpha_bar = np.asarray(method.schedule.alphas_cumprod)[np.asarray(t)][:, None, None, None]
    z0, eps = np.asarray(batch.latents), np.asarray(noise)
    z_t = np.sqrt(alpha_bar) * z0 + np.sqrt(1 - alpha_bar) * eps
    velocity = np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * z0
    unet = effective_unet(trainable, frozen)
    features = domain.base.features(unet, jnp.asarray(z_t), t, empty_states(method, frozen, 4))
    folded = method.encoder.apply({"params": domain.encoder}, batch.clip, method="fold")
    word = concept_word(method, trainable, frozen, folded, features)
    text = prompt_states(method, frozen, batch.ids, batch.placeholder, word.embedding)
    output = np.asarray(domain.base.denoise(unet, jnp.asarray(z_t), t, text)[0])
    mask = np.asarray(batch.mask)[..., None]
    denoising = ((output - velocity) ** 2 * mask).sum() / (mask.sum() * z0.shape[-1])
    size = (np.asarray(word.offset) ** 2).sum(-1).mean() / squared_length(domain)
    np.testing.assert_allclose(terms["denoising"], denoising, rtol=1e-5)
    np.testing.assert_allclose(loss, denoising + 0.1 * size, rtol=1e-5)


@pytest.mark.compiles
def test_gradients_reach_encoder_and_offsets_and_nothing_frozen(domain, concept_batch, trainable, frozen):
    loss = jax.jit(
        jax.grad(lambda tr, fr: e4t_loss(domain.method, tr, fr, concept_batch, jax.random.key(0), weights=LossWeights(0.1))[0])
    )
    gradients = loss(trainable, frozen)
    assert jax.tree.structure(gradients) == jax.tree.structure(trainable)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
    assert gradients.unet is None and gradients.residual is None


@pytest.mark.compiles
def test_a_prediction_that_is_given_is_one_word_for_all(domain, concept_batch, draws, trainable, frozen):
    """Restated picture by picture from the U-Net's output, with prompts taken by number; relative 1e-5. φ is not asked for."""
    t, noise = draws
    method, which = domain.method, jnp.array([2, 0, 2, 1])
    trainable = trainable._replace(residual=jnp.linspace(-1, 1, domain.base.text_width))
    predicted = jax.random.normal(jax.random.key(6), (domain.base.text_width,))
    batch = concept_batch._replace(prompt=which, clip=jnp.full_like(concept_batch.clip, jnp.nan))
    at = jax.jit(partial(e4t_loss_at, weights=LossWeights(0.1)))
    loss, terms = at(method, trainable, frozen, batch, Draws(t, noise), predicted=predicted)
    z_t = add_noise(method.schedule, batch.latents, noise, t)
    offset = method.scale * (np.asarray(predicted) + np.linspace(-1, 1, domain.base.text_width))
    word = np.asarray(domain.base.look_up(frozen.text_encoder, method.domain_id[None])[0]) + offset
    unet, errors = effective_unet(trainable, frozen), []
    for row, prompt in enumerate(which):
        own = batch.ids[prompt][None], batch.placeholder[prompt][None]
        text = prompt_states(method, frozen, *own, jnp.asarray(word, jnp.float32)[None])
        output = domain.base.denoise(unet, z_t[row][None], t[row][None], text)[0]
        target = training_target(method.schedule, batch.latents[row][None], noise[row][None], t[row][None])
        errors.append(np.asarray(output - target)[0] ** 2 * np.asarray(batch.mask[row])[..., None])
    denoising = np.sum(errors) / (np.sum(batch.mask) * batch.latents.shape[-1])
    np.testing.assert_allclose(terms["denoising"], denoising, rtol=1e-5)
    np.testing.assert_allclose(loss, denoising + 0.1 * (offset**2).sum() / squared_length(domain), rtol=1e-5)


@pytest.mark.compiles
def test_prompts_by_number_are_the_same_prompts(domain, concept_batch, draws, trainable, frozen):
    """Loss and gradients with a word a picture: prompts written out, or taken by number; 1e-6 of the largest."""
    t, noise = draws
    which = jnp.array([2, 0, 2, 1])
    written = concept_batch._replace(ids=concept_batch.ids[which], placeholder=concept_batch.placeholder[which])

    @jax.jit
    def loss(trainable, batch):
        return jax.value_and_grad(
            lambda own: e4t_loss_at(domain.method, own, frozen, batch, Draws(t, noise), weights=LossWeights(0.1))[0]
        )(trainable)

    ours, theirs = loss(trainable, concept_batch._replace(prompt=which)), loss(trainable, written)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())


@pytest.mark.compiles
def test_the_mean_prediction_is_that_of_the_draws_one_by_one(domain, concept_batch):
    """E through the domain's offsets, by the encoder's unfolded form; 1e-4 of the largest."""
    key, clip = jax.random.key(3), concept_batch.clip[0]
    mean = mean_prediction(domain.method, domain.frozen, concept_batch.latents, clip, key)
    t, noise = draw_timesteps_and_noise(domain.method, 4, key)
    z_t = add_noise(domain.method.schedule, concept_batch.latents, noise, t)
    unet = effective_unet(Trainable(domain.factors), domain.frozen._replace(factors=None))
    empty, each = empty_states(domain.method, domain.frozen, 1), []
    for row in range(4):
        features = domain.base.features(unet, z_t[row][None], t[row][None], empty)
        each.append(domain.method.encoder.apply({"params": domain.encoder}, clip[None], features, method="unfolded")[0])
    assert np.std(each, axis=0).max() > 1e-3 * np.abs(mean).max()
    np.testing.assert_allclose(mean, np.mean(each, axis=0), rtol=0, atol=1e-4 * np.abs(mean).max())


def test_placeholder_takes_the_word_anywhere_in_the_prompt(domain, frozen):
    """e* stands at the placeholder's position, and moves what comes after it, wherever it is (causal text encoder)."""

    prompts = ["*s on the beach", "a photo of *s", "a cartoon of a small *s in the snow"]
    ids, placeholder = domain.tokenize(prompts)
    word = 3 * jax.random.normal(jax.random.key(0), (3, domain.base.text_width))
    plain = domain.base.read(domain.params["text_encoder"], jnp.asarray(ids))
    changed = prompt_states(domain.method, frozen, jnp.asarray(ids), jnp.asarray(placeholder), word)
    differs = np.abs(np.asarray(plain - changed)).max(-1) > 1e-6
    for row, at in enumerate(placeholder.argmax(axis=1)):
        assert not differs[row, :at].any()
        assert differs[row, at:].all()


def test_domain_word_at_the_placeholder_is_the_plain_prompt(domain, frozen):
    """With e* = e_d the states are those of the prompt with the domain's word; 1e-6."""

    ids, placeholder = domain.tokenize(["a photo of *s in the snow"])
    word = domain.base.look_up(domain.params["text_encoder"], domain.method.domain_id[None])
    ours = prompt_states(domain.method, frozen, jnp.asarray(ids), jnp.asarray(placeholder), word)
    spelled = domain.base.tokenizer(["a photo of creature in the snow"], padding="max_length").input_ids
    theirs = domain.base.read(domain.params["text_encoder"], jnp.asarray(spelled))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
