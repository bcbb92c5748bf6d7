"""Domain pretraining: the encoder and the weight offsets learn one domain, the base model stays frozen.

    trainable ← AdamW(trainable, ∇ e4t_loss_at(trainable, batch, t, ε))

Pictures are encoded where the batch lies, on every device its own share, in the same compiled step.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.bases.protocol import Params
from e4t_jax.checks import BatchSize, Count, CountOrNone, Rate, Seed, Weight, Workers
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.image_inputs import Encoders, encode_pictures
from e4t_jax.machine import check_fits, is_out_of_memory
from e4t_jax.objective import ConceptBatch, Draws, Frozen, LossWeights, Method, Trainable, draw_timesteps_and_noise, e4t_loss_at
from e4t_jax.offsets import init_factors
from e4t_jax.training import optimizers
from e4t_jax.training.checkpoints import Checkpoints
from e4t_jax.training.flops import tflop_of
from e4t_jax.training.loop import Run, TrainState, init_state, train, update
from e4t_jax.training.parallel import Layout, layout_for
from e4t_jax.training.profiling import profiled


@struct.dataclass
class PretrainSettings:
    """How a domain is pretrained."""

    steps: Count = 2400
    """Update steps."""
    batch_size: BatchSize = 16
    """Pictures a step, over all devices."""
    learning_rate: Rate = 1.6e-5
    """Peak of the learning rate (warm-up, then cosine)."""
    regularisation: Weight = Domain.regularisation
    """λ: weight of the squared length of the word's offset over that of the domain's word."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the step is spread over the devices."""
    fsdp: Count = 1
    """Over how many devices the base, the weights that learn and their moments are split, with jit; 1 keeps them whole on each."""
    accumulate: Count = 1
    """Parts that a batch is taken in, one after the other, for want of memory; the numbers stay the same."""
    checkpoint_every: Count = 500
    """Steps from one checkpoint to the next."""
    watch_every: Count = 25
    """Steps from one look at the loss to the next: a line in metrics.jsonl, and a check that it is finite."""
    sample_every: CountOrNone = 500
    """Steps from one grid of samples, and one loss on what is held out, to the next; 0: none. A cache has no samples."""
    held_out: CountOrNone = 0
    """Pictures that nothing is learned from, evenly spread over the data: the loss on them is `validation_loss`."""
    workers: Workers = 0
    """Processes that read pictures ahead, beside each of the run's; 0: two of its threads. What is learned is the same."""
    seed: Seed = 0
    """Seed of the weights, the order of the pictures and the noise."""


class FrozenWeights(NamedTuple):
    """What a step reads and never changes: of the method, and of the encoding of pictures."""

    frozen: Frozen
    encoders: Encoders | None  # None where pictures come encoded


def frozen_weights(params: Params) -> FrozenWeights:
    """The parts of a base's weights that a step reads; without VAE among them, pictures have to come encoded."""
    encoders = Encoders(params["vae"], params["image_encoder"]) if "vae" in params else None
    return FrozenWeights(Frozen(params["unet"], params["text_encoder"]), encoders)


def init_trainable(method: Method, key: PRNGKeyArray) -> Trainable:
    """An encoder with random weights and offsets of zero."""
    base = method.base
    encoder_key, factor_key = jax.random.split(key)
    clip = jnp.zeros((1, method.encoder.clip_layers, base.image_encoder.width))
    features = jnp.zeros((1, base.feature_width))
    encoder = method.encoder.init(encoder_key, clip, features, method="unfolded")["params"]
    return Trainable(init_factors(factor_key, base.offset_kernels(base.param_shapes()["unet"])), encoder)


def concept_batch(method: Method, encoders: Encoders | None, rows: dict[str, Array]) -> ConceptBatch:
    """Rows of `data.batches` as the loss sees them; those of a cache (`data.cache`) are encoded already."""
    if encoders is None:
        latents, clip, mask = (rows[part].astype(jnp.float32) for part in ("latents", "clip", "mask"))
    else:
        latents, clip, mask = encode_pictures(method.base, encoders, rows["image"], rows["mask"])
    return ConceptBatch(latents, clip, rows["ids"], rows["placeholder"], mask)


def compile_step(
    method: Method, tx: optax.GradientTransformation, loss_weights: LossWeights, where: Layout, *, accumulate: int = 1
) -> Callable[[TrainState, FrozenWeights, dict[str, Array], PRNGKeyArray], tuple[TrainState, dict[str, Array]]]:
    """`step(state, weights, rows, key) -> (state, metrics)` over all devices, for arguments placed by `where`; donates the state.

    The randomness of a batch is drawn for all its rows, wherever they lie, and its mask is weighed as a whole: the numbers do not
    depend on how many devices or parts it is split over.
    """

    def step(state: TrainState, weights: FrozenWeights, rows: dict[str, Array], key: PRNGKeyArray):
        here = len(rows["ids"])
        draws = draw_timesteps_and_noise(method, here * where.replicas, jax.random.fold_in(key, state.step))
        mean_mask = jnp.mean(rows["mask"], dtype=jnp.float32)
        if where.axis is not None:
            first = here * jax.lax.axis_index(where.axis)
            draws = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, here), draws)
            mean_mask = jax.lax.pmean(mean_mask, where.axis)

        def loss(trainable: Trainable, weights: FrozenWeights, share: tuple[dict[str, Array], Draws], _: PRNGKeyArray):
            rows, draws = share
            trainable = where.gather(trainable)  # the base's weights are gathered by its networks, block by block
            batch = concept_batch(method, weights.encoders, rows)
            return e4t_loss_at(method, trainable, weights.frozen, batch, draws, weights=loss_weights, mean_mask=mean_mask)

        return update(loss, tx, state, weights, (rows, draws), key=key, axis=where.axis, accumulate=accumulate)

    return where.compile(step, (False, False, True, None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observers:
    """Who is told of a run, and who may end it."""

    track: Callable[..., Any] = iter  # wraps the loop over the steps: a progress bar
    # Told of the figures every `watch_every` steps, and of the 10¹² operations of a device in a step; gives those to show.
    record: Callable[[int, dict[str, float], float | None], dict[str, float]] = lambda step, figures, tflop: figures
    sample: Callable[[int, Trainable], None] | None = None  # called every `sample_every` steps, on every process
    profile: Path | None = None  # takes a trace of three steps
    stop: Callable[[], bool] = lambda: False  # asked after every step whether to save and end there


def pretrain_trainable(
    method: Method,
    weights: FrozenWeights,
    batches: Callable[[int], Iterable[dict[str, np.ndarray]]],
    settings: PretrainSettings,
    *,
    checkpoints: Checkpoints | None = None,
    tx: optax.GradientTransformation | None = None,
    observers: Observers = Observers(),
) -> Trainable:
    """Encoder and offsets after `settings.steps` steps, on the host; `batches(first)` yields rows of `data.batches` from that
    step on, this process's share of each batch.

    Goes on from the newest of `checkpoints` where there is one. `tx` takes the place of `optimizers.pretraining`.

    Errors: `UserError` for a batch that does not divide by the devices, for want of memory, and when the loss is not finite;
    `Stopped`.
    """
    where = layout_for(settings.batch_size, settings.accumulate, settings.parallel, settings.fsdp)
    tx = tx or optimizers.pretraining(settings.learning_rate, settings.steps)
    step: Any = compile_step(method, tx, LossWeights(settings.regularisation), where, accumulate=settings.accumulate)
    state = _first_state(method, settings, tx, where, checkpoints)
    timed = _TimedStep(step, where, settings.accumulate)
    _, key = _keys(settings)
    stored = where.unplace if where.parallel == "pmap" else lambda state: state
    with profiled(timed, observers.profile) as watched, contextlib.ExitStack() as held:

        def closed_in_the_end(first: int) -> Iterable[dict[str, np.ndarray]]:
            rows = batches(first)
            held.callback(getattr(rows, "close", lambda: None))  # what reads ahead ends before the process does
            return rows

        run = _run_of(settings, checkpoints, observers, timed, where)
        state = train(run, watched, state, where.place(weights), closed_in_the_end, key=key, stored=stored)
        return where.unplace(state.params)


def _keys(settings: PretrainSettings) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Of the weights before the first step, and of the noise of all steps."""
    weights, noise = jax.random.split(jax.random.key(settings.seed))
    return weights, noise


class _TimedStep:
    """A compiled step for rows on the host, and how much a device computes in it."""

    def __init__(self, step: Any, where: Layout, accumulate: int):
        self.step, self.where, self.accumulate = step, where, accumulate
        self.tflop: float | None = None
        self._is_checked = False

    def __call__(self, state: TrainState, weights: FrozenWeights, rows: dict[str, np.ndarray], key: PRNGKeyArray):
        try:
            return self._run(state, weights, rows, key)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("a step takes more memory than a device has; lower it, or raise accumulate.", "batch_size") from None

    def _run(self, state: TrainState, weights: FrozenWeights, rows: dict[str, np.ndarray], key: PRNGKeyArray):
        placed = self.where.place_rows(rows)
        if not self._is_checked:  # compiled here, and found compiled by the call
            self._is_checked = True
            compiled = self.step.lower(state, weights, placed, key).compile()
            check_fits(compiled, jax.local_devices(), lower="batch_size")
            self.tflop = tflop_of(compiled, self.accumulate)
        return self.step(state, weights, placed, key)


def _run_of(
    settings: PretrainSettings, checkpoints: Checkpoints | None, observers: Observers, step: _TimedStep, where: Layout
) -> Run:
    sample = observers.sample
    return Run(
        name="pretraining",
        steps=settings.steps,
        checkpoints=checkpoints,
        every=settings.checkpoint_every,
        track=observers.track,
        watch=settings.watch_every,
        record=lambda number, figures: observers.record(number, figures, step.tflop),
        every_sample=settings.sample_every if sample is not None else 0,
        sample=lambda number, params: None if sample is None else sample(number, where.unplace(params)),
        stop=observers.stop,
    )


def _first_state(
    method: Method, settings: PretrainSettings, tx: optax.GradientTransformation, where: Layout, checkpoints: Checkpoints | None
) -> TrainState:
    """The state before the first step, or of the newest checkpoint, on the devices."""
    begin = jax.device_get(init_state(init_trainable(method, _keys(settings)[0]), tx))
    if checkpoints is None:
        return where.place(begin)
    if where.parallel == "pmap":
        restored = checkpoints.restore(begin)
        return where.place(begin if restored is None else restored)
    restored = checkpoints.restore(where.shapes(begin))
    return where.place(begin) if restored is None else restored
