"""Tuning: it learns, every scope runs, and a concept in a batch is the concept alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax import backbone
from e4t_jax.domain import load_domain
from e4t_jax.errors import UserError
from e4t_jax.evaluation.trial import held_out
from e4t_jax.objective import e4t_loss
from e4t_jax.prompts import tokenize
from e4t_jax.tune import TuneSettings, Views, draw_batch, start, tune_one
from e4t_jax.world.pictures import as_floats


@pytest.fixture(scope="module")
def inputs(domain):
    keys = jax.random.split(jax.random.key(0), 2)
    views = Views(
        jax.random.normal(keys[0], (2, *domain.base.latent_shape)),
        jax.random.normal(keys[1], (backbone.feature_count(domain.base), domain.base.clip_width)),
        jnp.ones((2, *domain.base.latent_shape[:2])),
    )
    return views, tuple(jnp.asarray(part) for part in tokenize(domain.base.tokenizer, ["*s", "a photo of *s"]))


def test_concept_in_a_batch_equals_the_concept_alone():
    """In the shipped domain, with its own settings: maximum difference 1e-5 in every trained number."""
    creatures, trial = load_domain("creatures"), held_out(0, 3, split="validation")

    def tune(rows):
        masks = trial.masks[rows].astype(np.float32) / 255
        prompts = [[trial.captions[row]] for row in rows]
        return creatures.tune_pictures(as_floats(trial.pictures[rows]), masks, prompts, names=[str(row) for row in rows])

    for row, together in enumerate(tune([0, 1, 2])):
        (alone,) = tune([row])
        assert np.abs(together.trainable.residual).max() > 1e-2
        pairs = zip(jax.tree.leaves(together.trainable), jax.tree.leaves(alone.trainable), strict=True)
        for batched, single in (*pairs, (together.folded, alone.folded)):
            np.testing.assert_allclose(batched, single, atol=1e-5)


@pytest.mark.parametrize("scope", ["compact", "head", "full"])
def test_every_scope_starts_where_the_domain_is(domain, scope):
    """Δ = 0, r = 0 and the domain's own encoder and U-Net."""
    trainable = start(domain.method, domain.frozen, scope, jax.random.key(0))
    assert all(np.all(part["columns"] == 0) for part in trainable.factors.values())
    assert trainable.residual is None or np.all(trainable.residual == 0)
    assert trainable.encoder is (None if scope == "compact" else domain.encoder)
    assert trainable.unet is (domain.params["unet"] if scope == "full" else None)


def test_unknown_scope_is_refused(domain):
    with pytest.raises(UserError, match="--scope 'tiny'"):
        start(domain.method, domain.frozen, "tiny", jax.random.key(0))


@pytest.mark.parametrize("scope", ["compact", "head"])
def test_tuning_lowers_the_loss(domain, inputs, scope):
    """By more than 1 %, on draws of timesteps, noise, views and prompts that are the same before and after."""
    settings = TuneSettings(scope, steps=40, batch_size=4, learning_rate=0.05)
    views, prompts = inputs
    tuned, _ = jax.jit(tune_one)(domain.method, domain.frozen, views, prompts, jax.random.key(0), settings)
    keys = jax.random.split(jax.random.key(5), 3)
    batch = draw_batch(views, prompts, keys[0], keys[1], 64)
    loss = jax.jit(lambda trainable: e4t_loss(domain.method, trainable, domain.frozen, batch, keys[2], regularisation=0.0)[0])
    before = loss(start(domain.method, domain.frozen, scope, keys[0]))
    assert loss(tuned) < 0.99 * before
