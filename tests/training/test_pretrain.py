"""Pretraining: the loss falls from scratch, and jit over a mesh and pmap take the same kind of step."""

import itertools

import jax
import numpy as np
import optax
import pytest

from e4t_jax.encode import Encoders
from e4t_jax.errors import UserError
from e4t_jax.objective import Frozen, e4t_loss
from e4t_jax.training.loop import init_state
from e4t_jax.training.parallel import place, unplace
from e4t_jax.training.pretrain import Given, PretrainSettings, compile_step, init_trainable, pretrain_trainable
from e4t_jax.training.pretrain import concept_batch as concept_batch_of


@pytest.fixture(scope="module")
def rows(domain, concept_batch):
    """Four random pictures with their prompts, as `data.batches` yields them."""
    pixels = np.random.default_rng(0).uniform(-1, 1, (4, domain.base.image_size, domain.base.image_size, 3)).astype(np.float32)
    prompts = {"ids": np.asarray(concept_batch.ids), "placeholder": np.asarray(concept_batch.placeholder)}
    return {"image": pixels, "mask": np.ones(pixels.shape[:3], np.float32), **prompts}


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_loss_falls_from_scratch_and_frozen_parts_stay(domain, rows, parallel):
    """By more than 3 % in 40 steps, on the same 64 draws of timestep and noise before and after."""
    params, tx = domain.params, optax.adam(1e-2)
    given = Given(Frozen(params["unet"], params["text_encoder"]), Encoders(params["vae"], params["image_encoder"]))
    step = compile_step(domain.method, "layers", tx, 0.01, parallel)
    state = place(jax.device_get(init_state(init_trainable(domain.method, jax.random.key(0)), tx)), parallel, split=False)
    placed, batch = place(given, parallel, split=False), place(rows, parallel, split=True)
    seen = concept_batch_of(
        domain.method, "layers", given.encoders, {k: np.tile(v, (16, *[1] * (v.ndim - 1))) for k, v in rows.items()}
    )
    loss = jax.jit(
        lambda trainable: e4t_loss(domain.method, trainable, given.frozen, seen, jax.random.key(5), regularisation=0.0)[0]
    )
    before = loss(unplace(state, parallel).params)
    for _ in range(40):
        state, _ = step(state, placed, batch, jax.random.key(0))
    assert loss(unplace(state, parallel).params) < 0.97 * before
    assert int(unplace(state.step, parallel)) == 40
    for before, after in zip(jax.tree.leaves(given), jax.tree.leaves(unplace(placed, parallel)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_pretraining_encodes_pictures_as_tuning_does(domain, rows):
    """Latents, φ_clip and mask of a batch, against each part called by hand; relative 1e-5."""
    base, params = domain.base, domain.params
    batch = concept_batch_of(domain.method, "layers", Encoders(params["vae"], params["image_encoder"]), rows)
    np.testing.assert_allclose(batch.latents, base.encode(params["vae"], rows["image"]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batch.clip, base.see(params["image_encoder"], rows["image"]), rtol=1e-5, atol=1e-5)
    assert batch.mask.shape == batch.latents.shape[:3] and (np.asarray(batch.mask) == 1).all()


def test_batch_that_does_not_divide_by_the_devices_is_refused(concept_batch):
    with pytest.raises(UserError, match="batch_size: 3 does not divide by 2 devices"):
        place(jax.tree.map(lambda leaf: leaf[:3], concept_batch), "jit", split=True)


def test_an_optimiser_of_ones_own_takes_the_place_of_ours(domain, rows):
    """Plain gradient descent at rate 0 leaves everything where it was."""
    settings = PretrainSettings(steps=2, batch_size=4)
    start = init_trainable(domain.method, jax.random.key(settings.seed))
    batches = lambda first: itertools.repeat(rows)  # noqa: E731
    learned = pretrain_trainable(domain.method, "layers", domain.params, batches, settings, tx=optax.sgd(0.0))
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(learned), strict=True):
        np.testing.assert_array_equal(before, after)
