"""The diffusion process: how latents are noised, and what the U-Net is asked to predict.

With ᾱ_t the share of signal left at time t, write α_t = sqrt(ᾱ_t) and σ_t = sqrt(1 - ᾱ_t); α_t² + σ_t² = 1:

    z_t = α_t z_0 + σ_t ε                 forward process (Ho et al. 2020, arXiv 2006.11239, eq. 4)
    v_t = α_t ε - σ_t z_0                 velocity (Salimans & Ho 2022, arXiv 2202.00512, appendix D)

The pair (z_t, v_t) is the pair (z_0, ε) turned by an angle; turning it back recovers both:

    z_0 = α_t z_t - σ_t v_t               ε = σ_t z_t + α_t v_t
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int, Num, PRNGKeyArray

from e4t_jax.arrays import Array

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
    steps_offset: int = struct.field(pytree_node=False, default=1)
    set_alpha_to_one: bool | None = struct.field(pytree_node=False, default=None)
    limited: tuple[str, ...] = struct.field(pytree_node=False, default=())  # options of `LIMITED` that are not off

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of timesteps the model was trained with."""
        return self.alphas_cumprod.shape[0]


def alpha_sigma(schedule: NoiseSchedule, t: Int[Array, "*batch"], ndim: int) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """α_t = sqrt(ᾱ_t) and σ_t = sqrt(1 - ᾱ_t), with ones appended to the shape up to `ndim` axes."""
    alpha_bar = schedule.alphas_cumprod[jnp.asarray(t)]
    alpha_bar = alpha_bar.reshape(alpha_bar.shape + (1,) * (ndim - alpha_bar.ndim))
    return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


def draw_noise(key: PRNGKeyArray, shape: Sequence[int]) -> Float[Array, "..."]:
    """ε ~ N(0, 1), the numbers of `jax.random.normal(key, shape)`.

    Drawn in one row: over several short axes, XLA unrolls the generator into megabytes of a CPU's code.
    """
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


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

    `z` is z_t, of the variance-preserving process; `alpha` and `sigma` broadcast against it.
    """
    if prediction_type == "epsilon":
        return (z - sigma * output) / alpha, output
    return alpha * z - sigma * output, sigma * z + alpha * output
