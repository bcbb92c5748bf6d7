"""The samplers take diffusers' steps, run inside `lax.scan`, and arrive where a perfect model sends them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax import samplers
from e4t_jax.bases import scheduler_config
from e4t_jax.errors import UserError

SHAPE = (2, 4, 4, 3)
KEYS = jax.random.split(jax.random.key(0), SHAPE[0])
STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ZERO_SNR = STABLE_DIFFUSION | {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
IN_DIFFUSERS = {
    "ddim": "DDIMScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# The sampler is an argument: compiled once for each method, not once for each schedule.
step = jax.jit(lambda sampler, state, output, i: sampler.step(state, output, i))
fresh_noise = jax.jit(jax.vmap(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), SHAPE[1:]), in_axes=(0, None)))


def model_output(latents, call):
    """A random answer that depends on the latents too: showing the model the wrong ones would be seen."""
    return draw(100 + call, *SHAPE) + 0.3 * np.tanh(np.asarray(latents))


def perfect(schedule, z0):
    """The model that knows the one clean picture there is."""

    def answer(latents, alpha, sigma):
        noise = (latents - alpha * z0) / sigma
        return noise if schedule.prediction_type == "epsilon" else alpha * noise - sigma * z0

    return answer


def run(sampler, noise, answer, keys=None):
    """All calls in one `lax.scan`; `answer(latents, alpha, sigma)` stands for the model."""

    def call(state, i):
        return sampler.step(state, answer(state.latents, sampler.alpha[i], sampler.sigma[i]), i), None

    calls = jnp.arange(len(sampler.timesteps))
    return jax.jit(lambda noise: jax.lax.scan(call, sampler.init(noise, keys), calls)[0].latents)(noise)


def assert_same_steps(method, options, steps, monkeypatch):
    """Every call's timestep, model input and the result, against diffusers, to 1e-4 of the largest entry."""
    torch = pytest.importorskip("torch")
    import diffusers
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral

    fresh = (np.array(fresh_noise(KEYS, i)) for i in range(steps))
    monkeypatch.setattr(ancestral, "randn_tensor", lambda *_, **__: torch.from_numpy(next(fresh)))

    reference = getattr(diffusers, IN_DIFFUSERS[method]).from_config(options)
    reference.set_timesteps(steps)
    ours = samplers.sampler(options, method, steps)
    np.testing.assert_allclose(ours.timesteps, reference.timesteps.numpy(), rtol=1e-6)

    def check(state, latents):
        latents = latents.numpy()
        np.testing.assert_allclose(state.latents, latents, rtol=0, atol=1e-4 * np.abs(latents).max())

    noise = draw(0, *SHAPE)
    state, latents = ours.init(jnp.asarray(noise), KEYS), torch.from_numpy(noise) * reference.init_noise_sigma
    for i, t in enumerate(reference.timesteps):
        shown = reference.scale_model_input(latents, t)
        check(state, shown)
        latents = reference.step(torch.from_numpy(model_output(shown, i)), t, latents).prev_sample
        state = step(ours, state, model_output(state.latents, i), i)
    check(state, latents)


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("prediction_type", "spacing"),
    [("v_prediction", None)] + [("epsilon", spacing) for spacing in (None, *scheduler_config.TIMESTEP_SPACINGS)],
)
@pytest.mark.parametrize("method", samplers.METHODS)
def test_twenty_steps_are_those_of_diffusers_to_1e_4(method, prediction_type, spacing, monkeypatch):
    options = STABLE_DIFFUSION | {"prediction_type": prediction_type}
    options |= {} if spacing is None else {"timestep_spacing": spacing}
    assert_same_steps(method, options, 20, monkeypatch)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("method", samplers.METHODS)
def test_few_steps_are_those_of_diffusers_to_1e_4(method, steps, monkeypatch):
    assert_same_steps(method, STABLE_DIFFUSION, steps, monkeypatch)


@pytest.mark.parametrize("method", [name for name in samplers.METHODS if name != "pndm"])
def test_steps_from_no_signal_at_all_are_those_of_diffusers_to_1e_4(method, monkeypatch):
    assert_same_steps(method, ZERO_SNR, 20, monkeypatch)


@pytest.mark.parametrize("method", ["ddim", "pndm"])
@pytest.mark.parametrize("to_one", [True, False, None])
def test_the_clean_end_is_that_of_diffusers_to_1e_4(method, to_one, monkeypatch):
    options = {name: value for name, value in STABLE_DIFFUSION.items() if name != "set_alpha_to_one"}
    options |= {"beta_start": 0.02, "beta_end": 0.02}  # so that α_0 is far from 1
    options |= {} if to_one is None else {"set_alpha_to_one": to_one}
    assert_same_steps(method, options, 5, monkeypatch)


# PNDM's mean of past velocities is no velocity of today, so there is nothing exact for it to follow.
@pytest.mark.parametrize(
    ("method", "options"),
    [(method, STABLE_DIFFUSION) for method in samplers.METHODS]
    + [(method, ZERO_SNR) for method in samplers.METHODS if method != "pndm"],
)
def test_a_perfect_model_is_followed_to_its_picture_inside_a_scan_to_1e_4(method, options):
    options = options | {"set_alpha_to_one": True, "timestep_spacing": "trailing"}
    schedule = scheduler_config.noise_schedule(options)
    z0, noise = draw(1, *SHAPE), draw(2, *SHAPE)
    result = run(samplers.sampler(schedule, method, 20), noise, perfect(schedule, z0), KEYS)
    np.testing.assert_allclose(result, z0, rtol=0, atol=1e-4)


def test_the_second_order_sampler_keeps_eight_times_closer_to_the_exact_flow():
    schedule = scheduler_config.noise_schedule(STABLE_DIFFUSION | {"timestep_spacing": "trailing"})
    mean, deviation, noise = 1.0, 1.5, draw(2, *SHAPE)

    def spread(alpha, sigma):  # of z where z_0 ~ N(mean, deviation²)
        return jnp.sqrt(alpha**2 * deviation**2 + sigma**2)

    def error(method):  # before the last step, which is of first order in both
        sampler = samplers.sampler(schedule, method, 20)
        state = sampler.init(noise)
        for i in range(19):
            alpha, sigma = sampler.alpha[i], sampler.sigma[i]
            mean_noise = sigma * (state.latents - alpha * mean) / spread(alpha, sigma) ** 2
            state = step(sampler, state, mean_noise, i)
        scale = spread(sampler.alpha[19], sampler.sigma[19]) / spread(sampler.alpha[0], sampler.sigma[0])
        exact = sampler.alpha[19] * mean + scale * (noise - sampler.alpha[0] * mean)
        return jnp.abs(state.latents - exact).max()

    assert error("dpm++2m") < error("ddim") / 8


def test_pndm_calls_the_model_once_more_than_it_steps():
    calls = {method: len(samplers.sampler(STABLE_DIFFUSION, method, 20).timesteps) for method in samplers.METHODS}
    assert calls == {"ddim": 20, "dpm++2m": 20, "pndm": 21, "euler": 20, "euler-ancestral": 20}


def test_ancestral_noise_comes_from_the_key_alone():
    schedule = scheduler_config.noise_schedule(STABLE_DIFFUSION)
    sampler, noise = samplers.sampler(schedule, "euler-ancestral", 5), draw(0, *SHAPE)

    def result(seed):
        state = sampler.init(noise, jax.random.split(jax.random.key(seed), len(noise)))
        for i in range(5):
            state = step(sampler, state, state.latents, i)
        return state.latents

    np.testing.assert_array_equal(result(0), result(0))
    assert jnp.abs(result(0) - result(1)).max() > 0.1
    with pytest.raises(ValueError, match="needs a key"):
        sampler.init(noise)


@pytest.mark.parametrize("method", samplers.METHODS)
def test_half_precision_latents_stay_half_precision(method):
    sampler = samplers.sampler(STABLE_DIFFUSION, method, 3)
    result = run(sampler, jnp.asarray(draw(0, *SHAPE), jnp.bfloat16), lambda z, alpha, sigma: z, KEYS)
    assert result.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("method", "steps", "message"),
    [
        ("heun", 20, "sampling: 'heun' is unknown; choose one of ddim"),
        ("dpm++2m", 0, "steps: 0 is out of range: .* 1 to 999"),
        ("dpm++2m", 1000, "steps: 1000 is out of range: .* 1 to 999"),
        ("euler", 1001, "steps: 1001 is out of range: .* 1 to 1000"),
        ("pndm", 1000, "steps_offset 1, 1000 sampling steps"),
    ],
)
def test_what_cannot_be_sampled_is_said_in_one_line(method, steps, message):
    with pytest.raises(UserError, match=message):
        samplers.sampler(STABLE_DIFFUSION, method, steps)
