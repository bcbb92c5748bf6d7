"""The diffusion process: how latents are noised, and what the U-Net is asked to predict.

With ᾱ_t the share of signal left at time t, write α_t = sqrt(ᾱ_t) and σ_t = sqrt(1 - ᾱ_t); α_t² + σ_t² = 1:

    z_t = α_t z_0 + σ_t ε                 forward process (Ho et al. 2020, arXiv 2006.11239, eq. 4)
    v_t = α_t ε - σ_t z_0                 velocity (Salimans & Ho 2022, arXiv 2202.00512, appendix D)

The pair (z_t, v_t) is the pair (z_0, ε) turned by an angle; turning it back recovers both:

    z_0 = α_t z_t - σ_t v_t               ε = σ_t z_t + α_t v_t
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Num

from e4t_jax.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

# Options of diffusers' schedulers that change the numbers and that we do not implement: said, not ignored.
UNSUPPORTED = (
    "thresholding",
    "clip_sample",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)

Timesteps = Int[Array, " batch"] | Int[Array, ""]


@struct.dataclass
class NoiseSchedule:
    """The signal left at every timestep, ᾱ_t for t = 0 … T-1, and how the model and its samplers read it.

    Where the configuration says neither, `timestep_spacing` and `set_alpha_to_one` are `None`:
    every sampler has its own default.
    """

    alphas_cumprod: Float[Array, "timesteps"]
    prediction_type: str = struct.field(pytree_node=False, default="epsilon")
    timestep_spacing: str | None = struct.field(pytree_node=False, default=None)
    steps_offset: int = struct.field(pytree_node=False, default=0)
    set_alpha_to_one: bool | None = struct.field(pytree_node=False, default=None)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of timesteps the model was trained with."""
        return self.alphas_cumprod.shape[0]


def noise_schedule(scheduler_config: Mapping[str, Any]) -> NoiseSchedule:
    """Reads a diffusers `scheduler_config.json`: ᾱ_t = Π_{s ≤ t} (1 - β_s), with β by `beta_schedule`.

    linear              β from `beta_start` to `beta_end` in equal steps (Ho et al. 2020)
    scaled_linear       sqrt(β) in equal steps (Rombach et al. 2022; every Stable Diffusion)
    squaredcos_cap_v2   ᾱ(u) = cos²(π/2 (u + 0.008) / 1.008), β ≤ 0.999 (Nichol & Dhariwal, arXiv 2102.09672)

    Errors: `UserError` for a schedule, a prediction type or an option that is not implemented.
    """
    options: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
    options |= {"prediction_type": "epsilon", "steps_offset": 0} | dict(scheduler_config)
    for name in UNSUPPORTED:
        if options.get(name):
            raise UserError(f"scheduler_config.json: {name} is not supported; set it to false.")
    if options["prediction_type"] not in PREDICTION_TYPES:
        raise UserError(
            f"scheduler_config.json: prediction_type {options['prediction_type']!r} is not supported; "
            f"it must be one of {', '.join(PREDICTION_TYPES)}."
        )
    if options.get("timestep_spacing") not in (None, *TIMESTEP_SPACINGS):
        raise UserError(
            f"scheduler_config.json: timestep_spacing {options['timestep_spacing']!r} is not supported; "
            f"it must be one of {', '.join(TIMESTEP_SPACINGS)}."
        )
    alphas_cumprod = np.cumprod(1 - _betas(options))
    if options.get("rescale_betas_zero_snr"):
        if options["prediction_type"] == "epsilon":
            raise UserError(
                "scheduler_config.json: rescale_betas_zero_snr leaves no signal at the last timestep, "
                "where z_0 cannot be told from ε; it needs prediction_type v_prediction."
            )
        alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
    return NoiseSchedule(
        alphas_cumprod=jnp.asarray(alphas_cumprod, jnp.float32),
        prediction_type=options["prediction_type"],
        timestep_spacing=options.get("timestep_spacing"),
        steps_offset=int(options["steps_offset"]),
        set_alpha_to_one=options.get("set_alpha_to_one"),
    )


def alpha_sigma(schedule: NoiseSchedule, t: Int[Array, "*batch"], ndim: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """α_t = sqrt(ᾱ_t) and σ_t = sqrt(1 - ᾱ_t), with ones appended to the shape up to `ndim` axes."""
    alpha_bar = schedule.alphas_cumprod[jnp.asarray(t)]
    alpha_bar = alpha_bar.reshape(alpha_bar.shape + (1,) * (ndim - alpha_bar.ndim))
    return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


def add_noise(
    schedule: NoiseSchedule,
    z0: Float[Array, "batch height width channels"],
    noise: Float[Array, "batch height width channels"],
    t: Timesteps,
) -> Float[Array, "batch height width channels"]:
    """The forward process in one jump: z_t = α_t z_0 + σ_t ε (arXiv 2006.11239, eq. 4)."""
    alpha, sigma = alpha_sigma(schedule, t, z0.ndim)
    return alpha * z0 + sigma * noise


def training_target(
    schedule: NoiseSchedule,
    z0: Float[Array, "batch height width channels"],
    noise: Float[Array, "batch height width channels"],
    t: Timesteps,
) -> Float[Array, "batch height width channels"]:
    """What the model should answer: ε, or v_t = α_t ε - σ_t z_0 (arXiv 2202.00512, appendix D)."""
    if schedule.prediction_type == "epsilon":
        return noise
    alpha, sigma = alpha_sigma(schedule, t, z0.ndim)
    return alpha * noise - sigma * z0


def clean_and_noise(
    prediction_type: str,
    z: Float[Array, "batch height width channels"],
    output: Float[Array, "batch height width channels"],
    alpha: Num[Array, "..."],
    sigma: Num[Array, "..."],
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch height width channels"]]:
    """Splits z_t into the model's estimates (ẑ_0, ε̂) at the level (α, σ).

    epsilon:        ε̂ = output,  ẑ_0 = (z_t - σ ε̂) / α
    v_prediction:   ẑ_0 = α z_t - σ output,  ε̂ = σ z_t + α output
    """
    if prediction_type == "epsilon":
        return (z - sigma * output) / alpha, output
    return alpha * z - sigma * output, sigma * z + alpha * output


def predicted_clean(
    schedule: NoiseSchedule,
    z_t: Float[Array, "batch height width channels"],
    output: Float[Array, "batch height width channels"],
    t: Timesteps,
) -> Float[Array, "batch height width channels"]:
    """ẑ_0, the clean latents that the raw output (ε or v) at (z_t, t) stands for; see `clean_and_noise`."""
    return clean_and_noise(schedule.prediction_type, z_t, output, *alpha_sigma(schedule, t, z_t.ndim))[0]


def predicted_noise(
    schedule: NoiseSchedule,
    z_t: Float[Array, "batch height width channels"],
    output: Float[Array, "batch height width channels"],
    t: Timesteps,
) -> Float[Array, "batch height width channels"]:
    """ε̂, the noise that the raw output (ε or v) at (z_t, t) stands for; see `clean_and_noise`."""
    return clean_and_noise(schedule.prediction_type, z_t, output, *alpha_sigma(schedule, t, z_t.ndim))[1]


def _betas(options: Mapping[str, Any]) -> Float[np.ndarray, "timesteps"]:
    """β_t in float64: 1000 float32 products would drift in the last digits."""
    if options.get("trained_betas") is not None:
        return np.asarray(options["trained_betas"], np.float64)
    start, end, count = options["beta_start"], options["beta_end"], options["num_train_timesteps"]
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
                f"scheduler_config.json: beta_schedule {name!r} is not supported; "
                "it must be one of linear, scaled_linear, squaredcos_cap_v2."
            )


def _zero_terminal_snr(alphas_cumprod: Float[np.ndarray, "timesteps"]) -> Float[np.ndarray, "timesteps"]:
    """Shifts and scales α so that α_{T-1} = 0 and α_0 stays (Lin et al. 2023, arXiv 2305.08891, alg. 1)."""
    alpha = np.sqrt(alphas_cumprod)
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
