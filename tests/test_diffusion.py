"""The schedules are diffusers' schedules; the two targets are two names of one estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax import diffusion
from e4t_jax.errors import UserError

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def draw(seed=0, batch=4):
    """Random clean latents, noise and timesteps."""
    rng = np.random.default_rng(seed)
    z0, noise = rng.standard_normal((2, batch, 4, 4, 3)).astype(np.float32)
    return jnp.asarray(z0), jnp.asarray(noise), jnp.asarray(rng.integers(0, 1000, batch))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        STABLE_DIFFUSION,
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.03, "num_train_timesteps": 250},
        {"trained_betas": [0.1, 0.2, 0.4]},
    ],
)
def test_schedule_is_that_of_diffusers_to_1e_5(options, zero_snr):
    pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    options = options | {"rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
    expected = DDIMScheduler(**options).alphas_cumprod.numpy()
    np.testing.assert_allclose(diffusion.noise_schedule(options).alphas_cumprod, expected, rtol=0, atol=1e-5)


def test_zero_terminal_snr_leaves_no_signal_at_the_end_and_the_start_untouched():
    plain = diffusion.noise_schedule(STABLE_DIFFUSION | {"prediction_type": "v_prediction"}).alphas_cumprod
    rescaled = diffusion.noise_schedule(
        STABLE_DIFFUSION | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    ).alphas_cumprod
    assert rescaled[-1] == 0 and plain[-1] > 0.004
    np.testing.assert_allclose(rescaled[0], plain[0], rtol=1e-6)


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_noising_and_targets_are_those_of_diffusers_to_1e_5(prediction_type):
    torch = pytest.importorskip("torch")
    from diffusers import DDPMScheduler

    options = STABLE_DIFFUSION | {"prediction_type": prediction_type}
    schedule, reference = diffusion.noise_schedule(options), DDPMScheduler(**options)
    z0, noise, t = draw()
    arguments = [torch.from_numpy(np.array(a)) for a in (z0, noise, t)]
    noised = reference.add_noise(*arguments).numpy()
    target = noise if prediction_type == "epsilon" else reference.get_velocity(*arguments).numpy()
    np.testing.assert_allclose(diffusion.add_noise(schedule, z0, noise, t), noised, rtol=0, atol=1e-5)
    np.testing.assert_allclose(diffusion.training_target(schedule, z0, noise, t), target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_a_perfect_answer_gives_back_clean_latents_and_noise_to_1e_4(prediction_type):
    schedule = diffusion.noise_schedule(STABLE_DIFFUSION | {"prediction_type": prediction_type})
    z0, noise, t = draw()
    z_t = diffusion.add_noise(schedule, z0, noise, t)
    answer = diffusion.training_target(schedule, z0, noise, t)
    np.testing.assert_allclose(diffusion.predicted_clean(schedule, z_t, answer, t), z0, rtol=0, atol=1e-4)
    np.testing.assert_allclose(diffusion.predicted_noise(schedule, z_t, answer, t), noise, rtol=0, atol=1e-4)


def test_schedule_passes_through_jit_as_an_argument_and_takes_a_scalar_timestep():
    schedule = diffusion.noise_schedule(STABLE_DIFFUSION)
    z0, noise, _ = draw()
    one = jax.jit(diffusion.add_noise)(schedule, z0, noise, jnp.asarray(7))
    each = diffusion.add_noise(schedule, z0, noise, jnp.full(len(z0), 7))
    np.testing.assert_allclose(one, each, rtol=0, atol=1e-6)
    assert schedule.num_train_timesteps == 1000


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "sample"),
        ("timestep_spacing", "uniform"),
        ("thresholding", True),
        ("clip_sample", True),
        ("use_karras_sigmas", True),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_what_is_not_supported_is_said_in_one_line_that_names_it(option, value):
    with pytest.raises(UserError, match=option) as raised:
        diffusion.noise_schedule({option: value})
    assert "\n" not in str(raised.value)
