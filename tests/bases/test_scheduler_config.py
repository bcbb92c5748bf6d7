"""diffusers' scheduler_config.json, read as diffusers reads it."""

import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.bases import scheduler_config
from e4t_jax.errors import UserError

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def draw(seed=0, batch=4):
    """Random clean latents, noise and timesteps."""
    rng = np.random.default_rng(seed)
    z0, noise = rng.standard_normal((2, batch, 4, 4, 3)).astype(np.float32)
    return jnp.asarray(z0), jnp.asarray(noise), jnp.asarray(rng.integers(0, 1000, batch))


@pytest.mark.compiles
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
    np.testing.assert_allclose(scheduler_config.noise_schedule(options).alphas_cumprod, expected, rtol=0, atol=1e-5)


def test_zero_terminal_snr_leaves_no_signal_at_the_end_and_the_start_untouched():
    plain = scheduler_config.noise_schedule(STABLE_DIFFUSION | {"prediction_type": "v_prediction"}).alphas_cumprod
    rescaled = scheduler_config.noise_schedule(
        STABLE_DIFFUSION | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    ).alphas_cumprod
    assert rescaled[-1] == 0 and plain[-1] > 0.004
    np.testing.assert_allclose(rescaled[0], plain[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "sample"),
        ("timestep_spacing", "uniform"),
        ("thresholding", True),
        ("clip_sample", 1),
        ("prediction_type", None),
        ("timestep_spacing", None),
        ("beta_start", None),
        ("beta_end", "0.012"),
        ("num_train_timesteps", None),
        ("trained_betas", [0.1, 2.0]),
        ("solver_order", 3),
        ("algorithm_type", "sde-dpmsolver++"),
        ("solver_type", "heun"),
        ("final_sigmas_type", "sigma_min"),
        ("lambda_min_clipped", -5.1),
        ("variance_type", "learned"),
        ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"),
        ("use_dynamic_shifting", True),
        ("skip_prk_steps", False),
        ("an_option_of_tomorrow", 3),
        ("use_karras_sigmas", True),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_what_is_not_supported_is_said_in_one_line_that_names_it(option, value):
    with pytest.raises(UserError, match=option) as raised:
        scheduler_config.noise_schedule({option: value})
    assert "\n" not in str(raised.value)


def test_every_option_of_diffusers_schedulers_is_known():
    """What the five classes read is honoured, limited to what is computed, or inert; who reads it is right."""
    import inspect

    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    for name in set(scheduler_config.SCHEDULERS.values()):
        read = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
        assert read <= scheduler_config._HONOURED | scheduler_config._INERT | set(scheduler_config.LIMITED), name
        for option, (_, classes) in scheduler_config.LIMITED.items():
            assert (option in read) == (name in classes), (name, option)


def test_options_of_other_classes_are_passed_over_until_their_sampler_is_chosen():
    """As in diffusers, where PNDM ignores what only DPM-Solver reads."""
    from e4t_jax import samplers

    config = STABLE_DIFFUSION | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "use_karras_sigmas": True}
    schedule = scheduler_config.noise_schedule(config)
    assert len(samplers.sampler(schedule, "pndm", 5).timesteps) == 6
    with pytest.raises(
        UserError, match=r"sampling: dpm\+\+2m cannot be used on this base: .*use_karras_sigmas is supported as False"
    ):
        samplers.sampler(schedule, "dpm++2m", 5)
    with pytest.raises(UserError, match="use_karras_sigmas"):
        scheduler_config.noise_schedule(config | {"_class_name": "DPMSolverMultistepScheduler"})
    with pytest.raises(UserError, match="skip_prk_steps is supported as True alone"):
        scheduler_config.noise_schedule(STABLE_DIFFUSION | {"_class_name": "PNDMScheduler"})
    with pytest.raises(UserError, match="rescale_betas_zero_snr is nothing that PNDMScheduler reads"):
        scheduler_config.noise_schedule(config | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})


def test_a_scheduler_that_is_replaced_is_said():
    config = STABLE_DIFFUSION | {"_class_name": "UniPCMultistepScheduler", "solver_order": 3, "num_train_timesteps": 1000}
    with pytest.warns(
        UserWarning, match="UniPCMultistepScheduler is not implemented; where no sampler is named, ddim takes its place"
    ):
        scheduler_config.noise_schedule(config)
    # Its default of β is another than ours.
    with pytest.raises(UserError, match="HeunDiscreteScheduler is not supported, and beta_schedule is not given"):
        scheduler_config.noise_schedule({"_class_name": "HeunDiscreteScheduler"})


@pytest.mark.parametrize("name", sorted(scheduler_config.SCHEDULERS))
@pytest.mark.parametrize(
    "changes", [{}, {"steps_offset": 0}, {"clip_sample": True}, {"set_alpha_to_one": None}, {"steps_offset": 5}]
)
def test_old_configurations_are_read_as_stable_diffusion_pipeline_reads_them(name, changes):
    """Timesteps equal; one DDIM step of a large prediction, which clipping would change, to 1e-5."""
    torch = pytest.importorskip("torch")
    import diffusers

    from e4t_jax import samplers

    config = {
        key: value for key, value in STABLE_DIFFUSION.items() if key not in ("steps_offset", "clip_sample", "set_alpha_to_one")
    }
    config |= {"_class_name": name, "timestep_spacing": "leading"} | changes
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    scheduler = getattr(diffusers, name).from_config(config)
    parts = {part: None for part in ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")}
    pipeline = diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler, requires_safety_checker=False)
    theirs = pipeline.scheduler
    theirs.set_timesteps(7)
    sampler = samplers.sampler(config, samplers.own_method(config), 7)
    np.testing.assert_allclose(sampler.timesteps, theirs.timesteps.numpy(), rtol=1e-6)
    if samplers.own_method(config) != "ddim":
        return
    state = sampler.init(jnp.full((1, 2, 2, 1), 3.0))
    expected = torch.full((1, 2, 2, 1), 3.0)
    for i, t in enumerate(theirs.timesteps):
        state = sampler.step(state, jnp.full((1, 2, 2, 1), -2.0), i)
        expected = theirs.step(torch.full((1, 2, 2, 1), -2.0), t, expected).prev_sample
    np.testing.assert_allclose(state.latents, expected.numpy(), rtol=1e-5)
