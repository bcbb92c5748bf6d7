"""Samplers: from noise to latents along the model's own estimates, as pure steps for `jax.lax.scan`.

At level (α, σ) the model splits z into (ẑ_0, ε̂) with z = α ẑ_0 + σ ε̂ (see `process`). Every sampler here
takes the same step to the next, less noisy level (α', σ'): it puts the parts together again in other shares,

    z' = α' ẑ_0 + σ' ε̂                    DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12, η = 0)

and they differ in the estimate they trust, and in the levels they visit:

    ddim              the estimate of this call
    euler             the same: Euler's method in σ/α (Karras et al. 2022, arXiv 2206.00364) *is* DDIM's step;
                      levels may lie between timesteps, and the last is σ' = 0
    euler-ancestral   Euler's levels, and a part of σ' is fresh noise (DDIM with η = 1)
    dpm++2m           ẑ_0 extrapolated from the last two calls (Lu et al. 2022, arXiv 2211.01095, algorithm 2)
    pndm              the output extrapolated from the last four calls (Liu et al. 2022, arXiv 2202.09778);
                      one call more; as Stable Diffusion 1.x ships it, without Runge-Kutta steps

Latents are always variance preserving (α² + σ² = 1), so what a state holds is what the model is to be shown.
Timesteps and numbers are those of diffusers' schedulers with the same configuration.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int, Key, Num

from e4t_jax.arrays import Array
from e4t_jax.bases.scheduler_config import LIMITED, SCHEDULERS, limit_of, noise_schedule
from e4t_jax.errors import UserError
from e4t_jax.process import NoiseSchedule, clean_and_noise, draw_noise


class SamplerState(NamedTuple):
    """Latents z to show the model at the next call, at last the result; what else a sampler keeps."""

    latents: Float[Array, "batch height width channels"]
    past: tuple[Float[Array, "batch height width channels"], ...] = ()
    keys: Key[Array, " batch"] | None = None


@struct.dataclass
class Sampler:
    """The n calls of one way to sample; a pytree, so that it may be an argument of a compiled function.

        dpm = sampler(schedule, "dpm++2m", steps=20)
        def call(state, i):
            output = model(state.latents, dpm.timesteps[i])
            return dpm.step(state, output, i), None
        state, _ = jax.lax.scan(call, dpm.init(noise, keys), jnp.arange(len(dpm.timesteps)))

    Call i shows the model latents at the level (`alpha`, `sigma`)[i] and takes them to (`next_alpha`, `next_sigma`)[i].
    """

    timesteps: Num[Array, "calls"]
    alpha: Float[Array, "calls"]
    sigma: Float[Array, "calls"]
    next_alpha: Float[Array, "calls"]
    next_sigma: Float[Array, "calls"]
    prediction_type: str = struct.field(pytree_node=False)

    def init(self, noise: Float[Array, "batch height width channels"], keys: Key[Array, " batch"] | None = None) -> SamplerState:
        """The state before the first call, from noise ~ N(0, 1); `keys`, one a picture, are for noise added on the way."""
        raise NotImplementedError

    def step(
        self,
        state: SamplerState,
        output: Float[Array, "batch height width channels"],
        i: Int[Array, ""] | int,
    ) -> SamplerState:
        """The state after call i, at which the model answered `output` (raw: ε or v) to `state.latents`."""
        raise NotImplementedError


@struct.dataclass
class Ddim(Sampler):
    """z' = α' ẑ_0 + sqrt(σ'² - fresh²) ε̂ + fresh n, n ~ N(0, 1); without fresh noise, DDIM and Euler."""

    start: Float[Array, ""]
    kept: Float[Array, "calls"]
    fresh: Float[Array, "calls"]
    stochastic: bool = struct.field(pytree_node=False)

    def init(self, noise, keys=None):
        if self.stochastic and keys is None:
            raise ValueError("this sampler adds noise on the way: init(noise, keys) needs a key for each picture")
        return SamplerState((self.start * noise).astype(noise.dtype), keys=keys)

    def step(self, state, output, i):
        z = state.latents
        clean, noise = clean_and_noise(self.prediction_type, z, output, self.alpha[i], self.sigma[i])
        moved = self.next_alpha[i] * clean + self.kept[i] * noise
        if self.stochastic:
            moved += self.fresh[i] * jax.vmap(lambda key: draw_noise(jax.random.fold_in(key, i), z.shape[1:]))(state.keys)
        return state._replace(latents=moved.astype(z.dtype))


@struct.dataclass
class DpmSolver2M(Sampler):
    """z' = (σ'/σ) (z - α D) + α' D with D = ẑ_0 + w (ẑ_0 - ẑ_0,previous), DDIM's step with D for ẑ_0.

    ẑ_0 is taken for a straight line in the log signal-to-noise ratio λ = log(α/σ): with h = λ' - λ, and
    h_previous that of the step before, w = h / (2 h_previous). The first and the last step are plain (w = 0):
    the one has no past, and for the other, to σ' = 0, h is infinite.
    """

    extrapolation: Float[Array, "calls"]

    def init(self, noise, keys=None):
        return SamplerState(noise, past=(jnp.zeros_like(noise),))

    def step(self, state, output, i):
        z, (previous,) = state.latents, state.past
        alpha, sigma = self.alpha[i], self.sigma[i]
        clean, _ = clean_and_noise(self.prediction_type, z, output, alpha, sigma)
        estimate = clean + self.extrapolation[i] * (clean - previous)
        moved = self.next_sigma[i] / sigma * (z - alpha * estimate) + self.next_alpha[i] * estimate
        return SamplerState(moved.astype(z.dtype), past=(clean.astype(z.dtype),))


# Adams-Bashforth: this call's output and the last three, as the past grows. The second call is the exception:
# it looks at where the first one led and, with the mean of both, takes the first step again.
_ADAMS = np.array([[24, 0, 0, 0], [12, 12, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


@struct.dataclass
class Pndm(Sampler):
    """DDIM's step with e = Σ_k a_k e_{i-k}, a linear multistep estimate, for the model's output."""

    def init(self, noise, keys=None):
        return SamplerState(noise, past=(jnp.zeros_like(noise),) * 4)

    def step(self, state, output, i):
        z, (*outputs, first) = state.latents, state.past
        output = output.astype(z.dtype)
        weights = jnp.asarray(_ADAMS, jnp.float32)[jnp.minimum(i, 4)]
        estimate = sum(a * e for a, e in zip(weights, [output, *outputs], strict=True))
        again = jnp.asarray(i) == 1
        first = jnp.where(jnp.asarray(i) == 0, z, first)
        origin = jnp.where(again, first, z)
        clean, noise = clean_and_noise(self.prediction_type, origin, estimate, self.alpha[i], self.sigma[i])
        moved = self.next_alpha[i] * clean + self.next_sigma[i] * noise
        # The trial output of the second call is not remembered.
        kept = [jnp.where(again, old, new) for old, new in zip(outputs, [output, *outputs[:2]], strict=True)]
        return SamplerState(moved.astype(z.dtype), past=(*kept, first))


def own_method(scheduler_config: Mapping[str, Any]) -> str:
    """The sampler that a `scheduler_config.json` names; "ddim" where it names none of `METHODS` (`noise_schedule` says so)."""
    name = SCHEDULERS.get(scheduler_config.get("_class_name", ""))
    return next((method for method, row in METHODS.items() if row.scheduler == name), "ddim")


def sampler(schedule: NoiseSchedule | Mapping[str, Any], method: str = "ddim", steps: int = 50) -> Sampler:
    """The sampler `method` (a key of `METHODS`) with `steps` steps, for a schedule or a `scheduler_config`.

    Where the configuration names no `timestep_spacing`, it is that of diffusers: "leading" for ddim and pndm,
    "linspace" for the others.

    Errors: `UserError` for an unknown method, for a number of steps that the schedule does not hold, and for an option of the
    configuration that diffusers' scheduler of this method reads and that is not implemented.
    """
    if method not in METHODS:
        raise UserError(f"{method!r} is unknown; choose one of {', '.join(METHODS)}.", "sampling")
    if isinstance(schedule, Mapping):
        schedule = noise_schedule(schedule)
    row = METHODS[method]
    for option in schedule.limited:
        if row.scheduler in LIMITED[option][1] and row.scheduler != "PNDMScheduler":  # whose Runge-Kutta steps are never taken
            raise UserError(f"{method} cannot be used on this base: {limit_of(option)}", "sampling")
    limit = schedule.num_train_timesteps - row.beyond
    if not 1 <= steps <= limit:
        raise UserError(f"{steps} is out of range: {method} on this model takes 1 to {limit}.", "steps")
    return row.build(schedule, steps)


def _ddim(schedule: NoiseSchedule, steps: int) -> Ddim:
    timesteps = _timesteps(schedule, steps, schedule.timestep_spacing or "leading")
    levels = _levels(schedule, timesteps, steps, set_alpha_to_one=schedule.set_alpha_to_one is not False)
    return Ddim(
        timesteps=jnp.asarray(timesteps),
        **levels,
        prediction_type=schedule.prediction_type,
        start=jnp.ones(()),
        kept=levels["next_sigma"],
        fresh=jnp.zeros(steps),
        stochastic=False,
    )


def _pndm(schedule: NoiseSchedule, steps: int) -> Pndm:
    timesteps = _timesteps(schedule, steps, schedule.timestep_spacing or "leading")
    # Calls at t_0, t_1, t_1, t_2, …: the second one answers for the step that led to t_1.
    calls = np.insert(timesteps, 1, timesteps[1:2])
    origins = calls + (np.arange(len(calls)) == 1) * (schedule.num_train_timesteps // steps)
    levels = _levels(schedule, origins, steps, set_alpha_to_one=schedule.set_alpha_to_one is True)
    return Pndm(timesteps=jnp.asarray(calls), **levels, prediction_type=schedule.prediction_type)


def _dpm_solver_2m(schedule: NoiseSchedule, steps: int) -> DpmSolver2M:
    spacing = schedule.timestep_spacing or "linspace"
    # Unless "trailing", one timestep more is laid out, and the least noisy gives way to the clean end.
    timesteps = _timesteps(schedule, steps + (spacing != "trailing"), spacing)[:steps]
    levels = _levels_to_zero(schedule, timesteps)
    h = jnp.diff(jnp.log(levels["alpha"] / levels["sigma"]))
    return DpmSolver2M(
        timesteps=jnp.asarray(timesteps),
        **levels,
        prediction_type=schedule.prediction_type,
        extrapolation=jnp.zeros(steps).at[1:-1].set(h[1:] / (2 * h[:-1])),
    )


def _euler(schedule: NoiseSchedule, steps: int, *, ancestral: bool) -> Ddim:
    spacing = schedule.timestep_spacing or "linspace"
    timesteps = _timesteps(schedule, steps, spacing, whole=False)
    levels = _levels_to_zero(schedule, timesteps)
    alpha, sigma, next_alpha, next_sigma = levels.values()
    # η = 1: σ'² = kept² + fresh², with kept/α' = (σ'/α')² / (σ/α).
    kept = next_sigma * (next_sigma / next_alpha) / (sigma / alpha) if ancestral else next_sigma
    return Ddim(
        timesteps=jnp.asarray(timesteps),
        **levels,
        prediction_type=schedule.prediction_type,
        # "leading" starts short of the last timestep and pretends that no signal is left there.
        start=jnp.ones(()) if spacing == "leading" else sigma[0],
        kept=kept,
        fresh=jnp.sqrt(jnp.maximum(next_sigma**2 - kept**2, 0)),
        stochastic=ancestral,
    )


def _timesteps(schedule: NoiseSchedule, steps: int, spacing: str, *, whole: bool = True) -> Num[np.ndarray, "steps"]:
    """Timesteps from noisy to clean, spaced as in Lin et al. 2023 (arXiv 2305.08891, table 2)."""
    total = schedule.num_train_timesteps
    timesteps: np.ndarray
    match spacing:
        case "leading":
            timesteps = np.arange(steps)[::-1] * (total // steps) + schedule.steps_offset
        case "trailing":
            timesteps = np.round(total - np.arange(steps) * (total / steps)) - 1
        case "linspace":
            timesteps = np.linspace(0, total - 1, steps)[::-1]
            timesteps = timesteps.round() if whole else timesteps
    if timesteps[0] >= total:
        raise UserError(
            f"scheduler_config.json: with steps_offset {schedule.steps_offset}, {steps} sampling steps "
            f"run past timestep {total - 1}; take fewer."
        )
    return timesteps.astype(np.int32 if whole or spacing != "linspace" else np.float32)


def _levels(
    schedule: NoiseSchedule, t: Int[np.ndarray, "calls"], steps: int, *, set_alpha_to_one: bool
) -> dict[str, Float[Array, "calls"]]:
    """(α, σ) at t and at t - T // steps; where that is negative, α' = 1, or α_0 if not `set_alpha_to_one`."""

    def level(t):
        end = 1.0 if set_alpha_to_one else schedule.alphas_cumprod[0]
        alpha_bar = jnp.where(t < 0, end, schedule.alphas_cumprod[np.maximum(t, 0)])
        return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)

    (alpha, sigma), (next_alpha, next_sigma) = level(t), level(t - schedule.num_train_timesteps // steps)
    return {"alpha": alpha, "sigma": sigma, "next_alpha": next_alpha, "next_sigma": next_sigma}


def _levels_to_zero(schedule: NoiseSchedule, t: Num[np.ndarray, "calls"]) -> dict[str, Float[Array, "calls"]]:
    """(α, σ) at t and at the t that follows, the clean end (1, 0) last; σ/α is interpolated in t."""
    # No signal at all would make σ/α infinite; 2^-24 is diffusers' stand-in for it.
    alpha_bar = jnp.where(schedule.alphas_cumprod == 0, 2.0**-24, schedule.alphas_cumprod)
    grid = jnp.arange(len(alpha_bar), dtype=jnp.float32)
    ratio = jnp.interp(t.astype(np.float32), grid, jnp.sqrt((1 - alpha_bar) / alpha_bar))
    ratio = jnp.append(ratio, 0.0)
    alpha = 1 / jnp.sqrt(1 + ratio**2)
    sigma = ratio * alpha
    return {"alpha": alpha[:-1], "sigma": sigma[:-1], "next_alpha": alpha[1:], "next_sigma": sigma[1:]}


class Method(NamedTuple):
    """A way to sample: who builds it, whose class it is in a `scheduler_config.json`, timesteps laid out but not visited."""

    build: Callable[[NoiseSchedule, int], Sampler]
    scheduler: str
    beyond: int = 0


METHODS: dict[str, Method] = {
    "ddim": Method(_ddim, "DDIMScheduler"),
    "dpm++2m": Method(_dpm_solver_2m, "DPMSolverMultistepScheduler", beyond=1),
    "pndm": Method(_pndm, "PNDMScheduler"),
    "euler": Method(partial(_euler, ancestral=False), "EulerDiscreteScheduler"),
    "euler-ancestral": Method(partial(_euler, ancestral=True), "EulerAncestralDiscreteScheduler"),
}
