"""diffusers' scheduler_config.json as a noise schedule: every option is honoured, known to change nothing, or refused by name."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from e4t_jax.errors import UserError
from e4t_jax.process import NoiseSchedule

PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

_DDIM, _PNDM, _DPM = "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"
_EULER, _ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
# diffusers' classes that we sample as, or compute the same as one of them.
SCHEDULERS = {**{name: name for name in (_DDIM, _PNDM, _DPM, _EULER, _ANCESTRAL)}, "DDIMParallelScheduler": _DDIM}

_OFF = (False, None)
# Options that change the numbers and are not implemented: the values that leave them off, and the classes that read them.
LIMITED: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "thresholding": (_OFF, (_DDIM, _DPM)),
    "use_karras_sigmas": (_OFF, (_DPM, _EULER)),
    "use_exponential_sigmas": (_OFF, (_DPM, _EULER)),
    "use_beta_sigmas": (_OFF, (_DPM, _EULER)),
    "use_lu_lambdas": (_OFF, (_DPM,)),
    "use_flow_sigmas": (_OFF, (_DPM,)),
    "use_dynamic_shifting": (_OFF, (_DPM,)),
    "solver_order": ((2,), (_DPM,)),
    "algorithm_type": (("dpmsolver++", "deis"), (_DPM,)),  # diffusers reads the second as the first
    "solver_type": (("midpoint", "logrho", "bh1", "bh2"), (_DPM,)),  # and the last three as the first
    "final_sigmas_type": (("zero",), (_DPM, _EULER)),
    "lambda_min_clipped": ((-math.inf,), (_DPM,)),
    "variance_type": ((None,), (_DPM,)),
    "interpolation_type": (("linear",), (_EULER,)),
    "timestep_type": (("discrete",), (_EULER,)),
    "skip_prk_steps": ((True,), (_PNDM,)),
}
# Options that change nothing as long as those above are off: what they modify is not done, or always done here.
_INERT = frozenset(
    {
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
        "clip_sample",  # StableDiffusionPipeline switches it off
        "clip_sample_range",
        "dynamic_thresholding_ratio",
        "euler_at_final",
        "flow_shift",
        "lower_order_final",
        "sample_max_value",
        "sigma_max",
        "sigma_min",
        "steps_offset",  # StableDiffusionPipeline sets it to 1
        "time_shift_type",
        # Of classes that are replaced, which is said.
        "disable_corrector",
        "noise_sampler_seed",
        "original_inference_steps",
        "predict_x0",
        "rho",
        "shift_terminal",
        "sigma_data",
        "sigma_schedule",
        "solver_p",
        "timestep_scaling",
    }
)
_BETAS: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
_HONOURED = frozenset(
    {*_BETAS, "prediction_type", "rescale_betas_zero_snr", "set_alpha_to_one", "timestep_spacing", "trained_betas"}
)
_STEPS_OFFSET = 1  # what StableDiffusionPipeline reads into every configuration, whatever it says
_FILE = "scheduler_config.json"


def noise_schedule(scheduler_config: Mapping[str, Any]) -> NoiseSchedule:
    """Reads a diffusers `scheduler_config.json` as StableDiffusionPipeline does: ᾱ_t = Π_{s ≤ t} (1 - β_s), β by `beta_schedule`.

        linear              β from `beta_start` to `beta_end` in equal steps (Ho et al. 2020)
        scaled_linear       sqrt(β) in equal steps (Rombach et al. 2022; every Stable Diffusion)
        squaredcos_cap_v2   ᾱ(u) = cos²(π/2 (u + 0.008) / 1.008), β ≤ 0.999 (Nichol & Dhariwal, arXiv 2102.09672)

    That pipeline sets `steps_offset` to 1 and `clip_sample` to false, whatever an old configuration says; so do we.

    Errors: `UserError` for a schedule, a prediction type or an option that is not implemented, by its name.
    """
    given = dict(scheduler_config)
    named = given.get("_class_name")
    if named is not None and named not in SCHEDULERS:
        # The defaults of other classes are other numbers.
        missing = [] if given.get("trained_betas") else [name for name in _BETAS if name not in given]
        if missing:
            raise UserError(f"{_FILE}: {named} is not supported, and {missing[0]} is not given; write {missing[0]} into it.")
        warnings.warn(f"{_FILE}: {named} is not implemented; where no sampler is named, ddim takes its place.", stacklevel=2)
    limited = _check_options(given)
    options = {**_BETAS, "prediction_type": "epsilon", **given}
    if isinstance(given.get("trained_betas"), list) and "num_train_timesteps" not in given:
        options["num_train_timesteps"] = len(given["trained_betas"])
    alphas_cumprod = np.cumprod(1 - _betas(options))
    if options.get("rescale_betas_zero_snr"):
        if SCHEDULERS.get(str(named)) == _PNDM:
            raise UserError(
                f"{_FILE}: rescale_betas_zero_snr is nothing that {named} reads; set it to false, or name DDIMScheduler."
            )
        if options["prediction_type"] == "epsilon":
            raise UserError(
                f"{_FILE}: rescale_betas_zero_snr leaves no signal at the last timestep, "
                "where z_0 cannot be told from ε; it needs prediction_type v_prediction."
            )
        alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
    return NoiseSchedule(
        alphas_cumprod=jnp.asarray(alphas_cumprod, jnp.float32),
        prediction_type=options["prediction_type"],
        timestep_spacing=options.get("timestep_spacing"),
        # Given as null it is off, as in diffusers; not given, it is the sampler's own.
        set_alpha_to_one=bool(options["set_alpha_to_one"]) if "set_alpha_to_one" in options else None,
        limited=limited,
    )


def limit_of(option: str) -> str:
    """The line that says what an option of `LIMITED` has to be."""
    values = " or ".join(repr(value) for value in LIMITED[option][0] if value is not None) or "null"
    return f"{_FILE}: {option} is supported as {values} alone; set it to that, or give another base."


def _check_options(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuses what changes the numbers and is not computed; returns what matters to samplers of other classes."""
    for name, value in given.items():
        if name not in _HONOURED | _INERT and name not in LIMITED and value is not None:
            raise UserError(f"{_FILE}: {name} = {value!r} is unknown here, and may change the numbers; remove it if not.")
        if name in ("rescale_betas_zero_snr", "set_alpha_to_one", "clip_sample") and not isinstance(value, bool | None):
            raise UserError(f"{_FILE}: {name} = {value!r} is neither true nor false; set it to one of them.")
    for name, known in (("prediction_type", PREDICTION_TYPES), ("timestep_spacing", TIMESTEP_SPACINGS)):
        if name in given and given[name] not in known:
            raise UserError(f"{_FILE}: {name} {given[name]!r} is not supported; it must be one of {', '.join(known)}.")
    limited = tuple(name for name, (values, _) in LIMITED.items() if name in given and given[name] not in values)
    own = SCHEDULERS.get(given.get("_class_name", _DDIM), _DDIM)
    for name in limited:
        if "_class_name" not in given or own in LIMITED[name][1]:
            raise UserError(limit_of(name))
    # PNDM's own default are Runge-Kutta steps.
    if "_class_name" in given and own == _PNDM and "skip_prk_steps" not in given:
        raise UserError(limit_of("skip_prk_steps"))
    return limited


def _betas(options: Mapping[str, Any]) -> Float[np.ndarray, "timesteps"]:
    """β_t in float64: 1000 float32 products would drift in the last digits."""
    start, end, count = options["beta_start"], options["beta_end"], options["num_train_timesteps"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"{_FILE}: num_train_timesteps = {count!r} is no number of timesteps; give 1 or more.")
    if options.get("trained_betas") is not None:
        try:
            betas = np.asarray(options["trained_betas"], np.float64)
        except (TypeError, ValueError):
            betas = np.zeros(0)
        if betas.shape != (count,) or not ((betas > 0) & (betas < 1)).all():
            raise UserError(f"{_FILE}: trained_betas are not num_train_timesteps = {count} numbers between 0 and 1; give as many.")
        return betas
    for name, value in (("beta_start", start), ("beta_end", end)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise UserError(f"{_FILE}: {name} = {value!r} is no number between 0 and 1; copy the file again.")
    match options["beta_schedule"]:
        case "linear":
            return np.linspace(start, end, count)
        case "scaled_linear":
            return np.linspace(start**0.5, end**0.5, count) ** 2
        case "squaredcos_cap_v2":
            u = np.arange(count + 1) / count
            alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
        case name:
            raise UserError(
                f"{_FILE}: beta_schedule {name!r} is not supported; it must be one of linear, scaled_linear, squaredcos_cap_v2."
            )


def _zero_terminal_snr(alphas_cumprod: Float[np.ndarray, "timesteps"]) -> Float[np.ndarray, "timesteps"]:
    """Shifts and scales α so that α_{T-1} = 0 and α_0 stays (Lin et al. 2023, arXiv 2305.08891, alg. 1)."""
    alpha = np.sqrt(alphas_cumprod)
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
