"""Pretraining: the loss falls from scratch, and jit over a mesh and pmap take the same kind of step."""

import jax
import numpy as np
import optax
import pytest

from e4t_jax.errors import UserError
from e4t_jax.training.pretrain import compile_step, init_state, init_trainable, place, unplace


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_loss_falls_from_scratch_and_frozen_parts_stay(domain, concept_batch, parallel):
    method, frozen = domain.method, domain.frozen._replace(factors=None, encoder=None)
    tx = optax.adam(3e-3)
    step = compile_step(method, tx, 0.01, parallel)
    state = place(jax.device_get(init_state(init_trainable(method, jax.random.key(0)), tx)), parallel, split=False)
    placed, batch = place(frozen, parallel, split=False), place(concept_batch, parallel, split=True)
    losses = []
    for _ in range(40):
        state, metrics = step(state, placed, batch, jax.random.key(0))
        losses.append(float(unplace(metrics["denoising"], parallel)))
    assert np.mean(losses[-10:]) < 0.97 * np.mean(losses[:10])
    assert int(unplace(state.step, parallel)) == 40
    for before, after in zip(jax.tree.leaves(frozen), jax.tree.leaves(unplace(placed, parallel)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_batch_that_does_not_divide_by_the_devices_is_refused(concept_batch):
    with pytest.raises(UserError, match="--batch-size 3 does not divide by 2 devices"):
        place(jax.tree.map(lambda leaf: leaf[:3], concept_batch), "jit", split=True)
