"""The schedules are diffusers' schedules; the two targets are two names of one estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax import process
from e4t_jax.bases import scheduler_config

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def draw(seed=0, batch=4):
    """Random clean latents, noise and timesteps."""
    rng = np.random.default_rng(seed)
    z0, noise = rng.standard_normal((2, batch, 4, 4, 3)).astype(np.float32)
    return jnp.asarray(z0), jnp.asarray(noise), jnp.asarray(rng.integers(0, 1000, batch))


@pytest.mark.parametrize("prediction_type", scheduler_config.PREDICTION_TYPES)
def test_noising_and_targets_are_those_of_diffusers_to_1e_5(prediction_type):
    torch = pytest.importorskip("torch")
    from diffusers import DDPMScheduler

    options = STABLE_DIFFUSION | {"prediction_type": prediction_type}
    schedule, reference = scheduler_config.noise_schedule(options), DDPMScheduler(**options)
    z0, noise, t = draw()
    arguments = [torch.from_numpy(np.array(a)) for a in (z0, noise, t)]
    noised = reference.add_noise(*arguments).numpy()
    target = noise if prediction_type == "epsilon" else reference.get_velocity(*arguments).numpy()
    np.testing.assert_allclose(process.add_noise(schedule, z0, noise, t), noised, rtol=0, atol=1e-5)
    np.testing.assert_allclose(process.training_target(schedule, z0, noise, t), target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", scheduler_config.PREDICTION_TYPES)
def test_a_perfect_answer_gives_back_clean_latents_and_noise_to_1e_4(prediction_type):
    schedule = scheduler_config.noise_schedule(STABLE_DIFFUSION | {"prediction_type": prediction_type})
    z0, noise, t = draw()
    z_t = process.add_noise(schedule, z0, noise, t)
    answer = process.training_target(schedule, z0, noise, t)
    levels = process.alpha_sigma(schedule, t, z_t.ndim)
    clean, found_noise = process.clean_and_noise(prediction_type, z_t, answer, *levels)
    np.testing.assert_allclose(clean, z0, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found_noise, noise, rtol=0, atol=1e-4)


def test_noise_is_that_of_jax_bit_for_bit():
    key, shape = jax.random.key(3), (2, 5, 3, 4)
    np.testing.assert_array_equal(process.draw_noise(key, shape), jax.random.normal(key, shape))


def test_schedule_passes_through_jit_as_an_argument_and_takes_a_scalar_timestep():
    schedule = scheduler_config.noise_schedule(STABLE_DIFFUSION)
    z0, noise, _ = draw()
    one = jax.jit(process.add_noise)(schedule, z0, noise, jnp.asarray(7))
    each = process.add_noise(schedule, z0, noise, jnp.full(len(z0), 7))
    np.testing.assert_allclose(one, each, rtol=0, atol=1e-6)
    assert schedule.num_train_timesteps == 1000
