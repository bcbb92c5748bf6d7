"""Pretraining takes the same steps however a batch is split over devices, mesh axes and parts."""

import jax
import numpy as np
import optax
import pytest

from e4t_jax.objective import LossWeights
from e4t_jax.pretraining.step import compile_step, frozen_weights, init_trainable
from e4t_jax.training import parallel
from e4t_jax.training.loop import init_state, read
from e4t_jax.training.parallel import layout

OPTIMISED = True  # sums of other orders differ by less where they are vectorised, as they are for a user

WAYS = {"jit": {}, "fsdp": {"fsdp": 2}, "pmap": {"parallel": "pmap"}, "parts": {"accumulate": 2}}


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def eight(domain, rows):
    """So many that no device computes a single one, which is another program, of matrices times vectors, and rounds otherwise.

    Their masks weigh more and less, so that no two shares of the batch weigh alike.
    """
    pixels = np.random.default_rng(1).uniform(-1, 1, (8, *rows["image"].shape[1:])).astype(np.float32)
    weights = np.linspace(0.1, 1, 8, dtype=np.float32)[:, None, None]
    words = {name: np.concatenate([rows[name]] * 2) for name in ("ids", "placeholder")}
    return {"image": pixels, "mask": weights * np.ones(pixels.shape[:3], np.float32), **words}


@pytest.fixture(scope="module")
def take_steps(domain, eight, monkeypatch_module):
    """Three steps: (losses, weights)."""
    monkeypatch_module.setattr(parallel, "_SMALL", 64)  # so that "fsdp" splits what a tiny domain has

    def take(devices, *, accumulate=1, **ways):
        where, tx, key = layout(**ways, devices=devices), optax.sgd(0.1, momentum=0.0), jax.random.key(0)
        step = compile_step(domain.method, tx, LossWeights(0.01), where, accumulate=accumulate)
        state = where.place(jax.device_get(init_state(init_trainable(domain.method, key), tx)))
        weights = where.place(jax.device_get(frozen_weights(domain.params)))
        for tree in (state.params, state.moments, weights):
            split = any("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(tree))
            assert split == (where.mesh.shape["fsdp"] > 1)
        batch, losses = where.place_rows(eight), []
        for _ in range(3):
            state, metrics = step(state, weights, batch, key)
            losses.append(float(np.mean(read(metrics["loss"]))))
        return losses, where.unplace(state.params)

    return take


@pytest.fixture(scope="module")
def on_one_device(take_steps):
    return take_steps(jax.devices()[:1])


@pytest.mark.compiles
@pytest.mark.parametrize("way", WAYS)
def test_the_numbers_do_not_depend_on_how_a_batch_is_split(domain, take_steps, on_one_device, way):
    """Losses, and every leaf's way, after three steps on two devices against those on one; relative 1e-4.

    By plain descent: Adam makes steps of one length even of gradients that are rounding alone.
    """
    losses, weights = take_steps(jax.devices()[:2], **WAYS[way])
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-4)
    begin = jax.tree.leaves(init_trainable(domain.method, jax.random.key(0)))
    for first, one, other in zip(begin, jax.tree.leaves(on_one_device[1]), jax.tree.leaves(weights), strict=True):
        rounding = 1e-6 * np.linalg.norm(one)
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(one - first) + rounding
