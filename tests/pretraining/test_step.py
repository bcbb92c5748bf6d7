"""Pretraining: the loss falls from scratch, and jit over a mesh and pmap take the same kind of step."""

import itertools

import jax
import numpy as np
import optax
import pytest

from e4t_jax.errors import UserError
from e4t_jax.image_inputs import Encoders
from e4t_jax.objective import LossWeights, Trainable, draw_timesteps_and_noise, e4t_loss, e4t_loss_at
from e4t_jax.pretraining.step import PretrainSettings, compile_step, frozen_weights, init_trainable, pretrain_trainable
from e4t_jax.pretraining.step import concept_batch as concept_batch_of
from e4t_jax.pretraining.validation import validation_loss
from e4t_jax.training import parallel
from e4t_jax.training.loop import init_state
from e4t_jax.training.parallel import fitting_count, layout, layout_for


@pytest.mark.compiles
@pytest.mark.parametrize("how", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_loss_falls_from_scratch_and_frozen_parts_stay(domain, rows, how):
    """By more than 3 % in 40 steps, on the same 64 draws of timestep and noise before and after."""
    params, tx = domain.params, optax.adam(1e-2)
    weights, where = frozen_weights(params), layout(how)
    step = compile_step(domain.method, tx, LossWeights(0.01), where)
    state = where.place(jax.device_get(init_state(init_trainable(domain.method, jax.random.key(0)), tx)))
    placed, batch = where.place(weights), where.place_rows(rows)
    seen = concept_batch_of(domain.method, weights.encoders, {k: np.tile(v, (16, *[1] * (v.ndim - 1))) for k, v in rows.items()})
    loss = jax.jit(
        lambda trainable: e4t_loss(domain.method, trainable, weights.frozen, seen, jax.random.key(5), weights=LossWeights(0.0))[0]
    )
    before = loss(where.unplace(state).params)
    for _ in range(40):
        state, _ = step(state, placed, batch, jax.random.key(0))
    assert loss(where.unplace(state).params) < 0.97 * before
    assert int(where.unplace(state.step)) == 40
    for before, after in zip(jax.tree.leaves(weights), jax.tree.leaves(where.unplace(placed)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_settings_that_do_not_fit_the_devices_are_one_line():
    with pytest.raises(UserError, match="fsdp: 2 devices do not divide by 3; choose a divisor of 2"):
        layout(fsdp=3)
    with pytest.raises(UserError, match="fsdp: pmap keeps everything whole"):
        layout("pmap", fsdp=2)
    with pytest.raises(UserError, match="batch_size: 4 does not divide by 2 devices × 4 parts; choose a multiple of 8"):
        layout().check_divides(4, 4)


@pytest.mark.parametrize(
    ("cores", "batch", "accumulate", "fsdp", "used"),
    [
        *[(1, 16, 1, 1, 1), (2, 1, 1, 1, 1), (6, 16, 1, 1, 4), (10, 16, 1, 1, 8), (12, 16, 1, 1, 8), (24, 16, 1, 1, 16)],
        *[(6, 18, 1, 1, 6), (64, 256, 1, 1, 64), (96, 64, 1, 1, 64), (24, 16, 4, 1, 4), (6, 16, 1, 4, 4), (12, 24, 4, 3, 6)],
        *[(2, 16, 1, 3, 2), (6, 2, 4, 1, 6)],  # none will do: what is wrong is said of all
    ],
)
def test_a_batch_takes_as_many_cores_as_divide_it(cores, batch, accumulate, fsdp, used):
    assert fitting_count(cores, batch, accumulate, fsdp) == used


def test_cores_that_stay_idle_are_said():
    said = []
    assert layout_for(4, say=said.append).mesh.size == 2 and not said
    assert layout_for(3, say=said.append).mesh.size == 1
    assert said == ["A batch of 3 does not divide by 2 CPU devices: 1 of them is used."]
    assert layout_for(1, parallel="pmap").mesh.size == 1


def test_a_batch_that_no_number_of_cores_divides_is_refused():
    with pytest.raises(UserError, match="batch_size: 2 does not divide by 2 devices × 4 parts; choose a multiple of 8"):
        layout_for(2, 4)
    with pytest.raises(UserError, match="fsdp: 2 devices do not divide by 3"):
        layout_for(2, fsdp=3)


@pytest.mark.parametrize("change", [(jax, "process_count", lambda: 2), (parallel, "_may_idle", lambda devices: False)])
def test_accelerators_and_the_devices_of_several_processes_are_taken_all(monkeypatch, change):
    monkeypatch.setattr(*change)
    with pytest.raises(UserError, match="contrast_batch: 3 does not divide by 2 devices; choose a multiple of 2"):
        layout_for(3, argument="contrast_batch")


@pytest.mark.compiles
@pytest.mark.parametrize("how", ["jit", "pmap"])
def test_a_run_leaves_a_core_idle_and_learns_the_same(domain, rows, how):
    """Three pictures, on one of two devices, or on the only one there is; relative 1e-5."""
    three = jax.tree.map(lambda leaf: leaf[:3], rows)
    settings = PretrainSettings(steps=2, batch_size=3, parallel=how)

    def learned():
        return pretrain_trainable(domain.method, frozen_weights(domain.params), lambda first: itertools.repeat(three), settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        alone = learned()
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(learned()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.compiles
def test_pretraining_encodes_pictures_as_tuning_does(domain, rows):
    """Latents, φ_clip and mask of a batch, against each part called by hand; relative 1e-5."""
    base, params = domain.base, domain.params
    batch = concept_batch_of(domain.method, Encoders(params["vae"], params["image_encoder"]), rows)
    np.testing.assert_allclose(batch.latents, base.encode(params["vae"], rows["image"]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batch.clip, base.image_encoder.see(params["image_encoder"], rows["image"]), rtol=1e-5, atol=1e-5)
    assert batch.mask.shape == batch.latents.shape[:3] and (np.asarray(batch.mask) == 1).all()


def test_batch_that_does_not_divide_by_the_devices_is_refused(concept_batch):
    with pytest.raises(UserError, match="batch_size: 3 does not divide by 2 devices"):
        layout().place_rows(jax.tree.map(lambda leaf: leaf[:3], concept_batch))


@pytest.mark.compiles
def test_an_optimiser_of_ones_own_takes_the_place_of_ours(domain, rows):
    """Plain gradient descent at rate 0 leaves everything where it was; what reads the batches is closed in the end."""
    settings = PretrainSettings(steps=2, batch_size=4)
    start = init_trainable(domain.method, jax.random.split(jax.random.key(settings.seed))[0])
    closed = []

    def batches(first):
        try:
            yield from itertools.repeat(rows)
        finally:
            closed.append(first)

    learned = pretrain_trainable(domain.method, frozen_weights(domain.params), batches, settings, tx=optax.sgd(0.0))
    assert closed == [0]
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(learned), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.compiles
def test_the_loss_on_what_is_held_out_is_that_of_all_of_it(domain, rows):
    """Two at once, with masks that cover more and less, against the loss of all four at the same draws; relative 1e-5."""
    cover = np.array([0.05, 0.3, 0.7, 1.0], np.float32)[:, None, None]
    rows = {**rows, "mask": rows["mask"] * cover}
    trainable, weights = Trainable(domain.factors, domain.encoder), frozen_weights(domain.params)
    batch = concept_batch_of(domain.method, weights.encoders, rows)
    draws = draw_timesteps_and_noise(domain.method, 4, jax.random.key(7))
    whole = jax.jit(e4t_loss_at)(domain.method, trainable, weights.frozen, batch, draws, weights=LossWeights(0.0))[0]
    found = validation_loss(domain.method, trainable, weights, rows, at_once=3)
    np.testing.assert_allclose(found, whole, rtol=1e-5)
