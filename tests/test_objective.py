"""The E4T loss: its terms, restated in NumPy, and where its gradients go."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.diffusion import add_noise
from e4t_jax.objective import (
    Trainable,
    concept_word,
    draw,
    e4t_loss,
    e4t_loss_at,
    effective_unet,
    empty_states,
    prompt_states,
    see_features,
)


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


@pytest.mark.compiles
def test_loss_is_the_masked_error_plus_the_regulariser(domain, concept_batch, draws, trainable, frozen):
    """Restated from the formulas in NumPy around the U-Net's own output; relative 1e-5."""
    t, noise = draws
    method, batch = domain.method, concept_batch
    loss, terms = jax.jit(partial(e4t_loss_at, regularisation=0.1))(method, trainable, frozen, batch, t, noise)
    alpha_bar = np.asarray(method.schedule.alphas_cumprod)[np.asarray(t)][:, None, None, None]
    z0, eps = np.asarray(batch.latents), np.asarray(noise)
    z_t = np.sqrt(alpha_bar) * z0 + np.sqrt(1 - alpha_bar) * eps
    velocity = np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * z0
    unet = effective_unet(trainable, frozen)
    features = domain.base.features(unet, jnp.asarray(z_t), t, empty_states(method, frozen, 4))
    folded = method.encoder.apply({"params": domain.encoder}, batch.clip, method="fold")
    word, offset = concept_word(method, trainable, frozen, folded, features)
    text = prompt_states(method, frozen, batch.ids, batch.placeholder, word)
    output = np.asarray(domain.base.denoise(unet, jnp.asarray(z_t), t, text)[0])
    mask = np.asarray(batch.mask)[..., None]
    denoising = ((output - velocity) ** 2 * mask).sum() / (mask.sum() * z0.shape[-1])
    size = (np.asarray(offset) ** 2).sum(-1).mean()
    np.testing.assert_allclose(terms["denoising"], denoising, rtol=1e-5)
    np.testing.assert_allclose(loss, denoising + 0.1 * size, rtol=1e-5)


@pytest.mark.compiles
def test_gradients_reach_encoder_and_offsets_and_nothing_frozen(domain, concept_batch, trainable, frozen):
    loss = jax.jit(
        jax.grad(lambda tr, fr: e4t_loss(domain.method, tr, fr, concept_batch, jax.random.key(0), regularisation=0.1)[0])
    )
    gradients = loss(trainable, frozen)
    assert jax.tree.structure(gradients) == jax.tree.structure(trainable)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
    assert gradients.unet is None and gradients.residual is None


@pytest.mark.compiles
def test_features_that_are_given_are_numbers(domain, concept_batch, draws, trainable, frozen):
    """The same φ gives the same loss and gradient of the encoder, 1e-5 of the largest; the offsets' lacks the way through φ."""
    t, noise = draws
    z_t = add_noise(domain.method.schedule, concept_batch.latents, noise, t)
    seen = domain.base.features(effective_unet(trainable, frozen), z_t, t, empty_states(domain.method, frozen, 4))

    @jax.jit
    def both(trainable, features):
        def loss(trainable, **given):
            return e4t_loss_at(domain.method, trainable, frozen, concept_batch, t, noise, regularisation=0.1, **given)[0]

        return jax.value_and_grad(loss)(trainable), jax.value_and_grad(loss)(trainable, features=features)

    (plain, followed), (given, gradient) = both(trainable, seen)
    np.testing.assert_allclose(given, plain, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(gradient.encoder), jax.tree.leaves(followed.encoder), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    pairs = zip(jax.tree.leaves(gradient.factors), jax.tree.leaves(followed.factors), strict=True)
    assert max(np.abs(one - other).max() / np.abs(other).max() for one, other in pairs) > 1e-2


def test_features_are_seen_in_the_order_of_their_timesteps(domain, concept_batch):
    """φ of each row by itself, through the domain's offsets; 1e-4."""
    key = jax.random.key(3)
    seen = see_features(domain.method, domain.frozen, concept_batch.latents, key)
    t, noise = draw(domain.method, 4, key)
    assert len(set(t.tolist())) == 4
    z_t = add_noise(domain.method.schedule, concept_batch.latents, noise, t)
    unet = effective_unet(Trainable(domain.factors), domain.frozen._replace(factors=None))
    empty = empty_states(domain.method, domain.frozen, 1)
    for row, at in zip(seen, sorted(range(4), key=lambda row: t[row]), strict=True):
        one = domain.base.features(unet, z_t[at][None], t[at][None], empty)[0]
        np.testing.assert_allclose(row, one, rtol=0, atol=1e-4)


@pytest.mark.compiles
def test_a_draw_takes_the_features_of_its_place_in_time(domain, concept_batch, trainable, frozen):
    """The loss of φ seen before, restated by counting the draws before each; 1e-6."""
    key = jax.random.key(7)
    shape = jax.eval_shape(see_features, domain.method, frozen, concept_batch.latents, key).shape
    seen = jax.random.normal(jax.random.key(8), shape)
    drawn = jax.jit(partial(e4t_loss, regularisation=0.1))
    loss, _ = drawn(domain.method, trainable, frozen, concept_batch, key, seen=seen)
    t, noise = draw(domain.method, len(seen), key)
    features = jnp.stack([seen[sum(other < own for other in t.tolist())] for own in t.tolist()])
    at = jax.jit(partial(e4t_loss_at, regularisation=0.1))
    np.testing.assert_allclose(loss, at(domain.method, trainable, frozen, concept_batch, t, noise, features=features)[0], rtol=1e-6)
    upside_down, _ = drawn(domain.method, trainable, frozen, concept_batch, key, seen=seen[::-1])
    assert abs(upside_down - loss) > 1e-4 * loss


def test_placeholder_takes_the_word_anywhere_in_the_prompt(domain, frozen):
    """e* stands at the placeholder's position, and moves what comes after it, wherever it is (causal text encoder)."""
    from e4t_jax.prompts import tokenize

    prompts = ["*s on the beach", "a photo of *s", "a cartoon of a small *s in the snow"]
    ids, placeholder = tokenize(domain.base.tokenizer, prompts)
    word = 3 * jax.random.normal(jax.random.key(0), (3, domain.base.text_width))
    plain = domain.base.read(domain.params["text_encoder"], jnp.asarray(ids))
    changed = prompt_states(domain.method, frozen, jnp.asarray(ids), jnp.asarray(placeholder), word)
    differs = np.abs(np.asarray(plain - changed)).max(-1) > 1e-6
    for row, at in enumerate(placeholder.argmax(axis=1)):
        assert not differs[row, :at].any()
        assert differs[row, at:].all()


def test_domain_word_at_the_placeholder_is_the_plain_prompt(domain, frozen):
    """With e* = e_d the states are those of the prompt with the domain's word; 1e-6."""
    from e4t_jax.prompts import tokenize

    ids, placeholder = tokenize(domain.base.tokenizer, ["a photo of *s in the snow"])
    word = domain.base.look_up(domain.params["text_encoder"], domain.method.domain_id[None])
    ours = prompt_states(domain.method, frozen, jnp.asarray(ids), jnp.asarray(placeholder), word)
    spelled = domain.base.tokenizer(["a photo of creature in the snow"], padding="max_length").input_ids
    theirs = domain.base.read(domain.params["text_encoder"], jnp.asarray(spelled))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
