"""Domain pretraining: the encoder and the weight offsets learn one domain, the base model stays frozen.

    trainable ← AdamW(trainable, ∇ e4t_loss_at(trainable, batch, t, ε))

Pictures are encoded where the batch lies, on every device its own share, in the same compiled step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.bases.protocol import Params
from e4t_jax.encode import Encoders, encode_pictures
from e4t_jax.objective import ConceptBatch, Draws, Frozen, Method, Trainable, draw, e4t_loss_at
from e4t_jax.offsets import init_factors
from e4t_jax.training import optimizers
from e4t_jax.training.checkpoints import Checkpoints
from e4t_jax.training.loop import Run, TrainState, init_state, train, update
from e4t_jax.training.parallel import Layout, layout
from e4t_jax.training.profiling import profiled
from e4t_jax.training.speed import tflop_of


@struct.dataclass
class PretrainSettings:
    """How a domain is pretrained."""

    STEPS_OF: ClassVar[str] = "training"
    steps: int = 2400
    """Update steps."""
    batch_size: int = 16
    """Pictures a step, over all devices."""
    learning_rate: float = 1.5e-3
    """Peak of the learning rate (warm-up, then cosine)."""
    regularisation: float = 0.001
    """λ: weight of the squared length of the word's offset."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the step is spread over the devices."""
    fsdp: int = 1
    """Over how many devices the base, the weights that learn and their moments are split, with jit; 1 keeps them whole on each."""
    accumulate: int = 1
    """Parts that a batch is taken in, one after the other, for want of memory; the numbers stay the same."""
    checkpoint_every: int = 500
    """Steps from one checkpoint to the next."""
    watch_every: int = 25
    """Steps from one look at the loss to the next: a line in metrics.jsonl, and a check that it is finite."""
    sample_every: int = 500
    """Steps from one grid of samples, and one loss on what is held out, to the next; 0: none. A cache has no samples."""
    held_out: int = 0
    """Pictures that nothing is learned from, evenly spread over the data: the loss on them is `validation_loss`."""
    workers: int = 0
    """Processes that read pictures ahead, beside each of the run's; 0: two of its threads. What is learned is the same."""
    seed: int = 0
    """Seed of the weights, the order of the pictures and the noise."""


class Given(NamedTuple):
    """What a step reads and never changes: of the method, and of the encoding of pictures."""

    frozen: Frozen
    encoders: Encoders | None  # None where pictures come encoded


def given_of(params: Params, dtype: str = "float32") -> Given:
    """The parts of a base's weights that a step reads, kernels in the dtype that the networks compute in.

    They are cast there anyway, and a step that reads them so moves half the bytes. Embeddings, scales and biases stay.
    """

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        return leaf.astype(dtype) if jax.tree_util.keystr(path[-1:], simple=True) == "kernel" else leaf

    params = jax.tree_util.tree_map_with_path(cast, params)
    encoders = Encoders(params["vae"], params["image_encoder"]) if "vae" in params else None
    return Given(Frozen(params["unet"], params["text_encoder"]), encoders)


def init_trainable(method: Method, key: PRNGKeyArray) -> Trainable:
    """An encoder with random weights and offsets of zero."""
    base = method.base
    encoder_key, factor_key = jax.random.split(key)
    clip = jnp.zeros((1, method.encoder.clip_layers, base.clip_width))
    features = jnp.zeros((1, base.feature_width))
    encoder = method.encoder.init(encoder_key, clip, features, method="unfolded")["params"]
    return Trainable(init_factors(factor_key, base.offset_kernels(base.param_shapes()["unet"])), encoder)


def concept_batch(method: Method, clip_features: str, encoders: Encoders | None, rows: dict[str, Array]) -> ConceptBatch:
    """Rows of `data.batches` as the loss sees them; those of a cache (`data.cache`) are encoded already."""
    if encoders is None:
        latents, clip, mask = (rows[part].astype(jnp.float32) for part in ("latents", "clip", "mask"))
    else:
        latents, clip, mask = encode_pictures(method.base, clip_features, encoders, rows["image"], rows["mask"])
    return ConceptBatch(latents, clip, rows["ids"], rows["placeholder"], mask)


def compile_step(
    method: Method,
    clip_features: str,
    tx: optax.GradientTransformation,
    regularisation: float,
    where: Layout,
    accumulate: int = 1,
) -> Callable[[TrainState, Given, dict[str, Array], PRNGKeyArray], tuple[TrainState, dict[str, Array]]]:
    """`step(state, given, rows, key) -> (state, metrics)` over all devices, for arguments placed by `where`; donates the state.

    The randomness of a batch is drawn for all its rows, wherever they lie, and its mask is weighed as a whole: the numbers do not
    depend on how many devices or parts it is split over.
    """

    def step(state: TrainState, given: Given, rows: dict[str, Array], key: PRNGKeyArray):
        here = len(rows["ids"])
        draws = draw(method, here * where.replicas, jax.random.fold_in(key, state.step))
        mean_mask = jnp.mean(rows["mask"], dtype=jnp.float32)
        if where.axis is not None:
            first = here * jax.lax.axis_index(where.axis)
            draws = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, here), draws)
            mean_mask = jax.lax.pmean(mean_mask, where.axis)

        def loss(trainable: Trainable, given: Given, share: tuple[dict[str, Array], Draws], _: PRNGKeyArray):
            rows, draws = share
            trainable = where.gather(trainable)  # what is given, the networks gather block by block
            batch = concept_batch(method, clip_features, given.encoders, rows)
            return e4t_loss_at(method, trainable, given.frozen, batch, *draws, regularisation=regularisation, mean_mask=mean_mask)

        return update(loss, tx, state, given, (rows, draws), key, axis=where.axis, accumulate=accumulate)

    return where.compile(step, (False, False, True, None))


def pretrain_trainable(
    method: Method,
    clip_features: str,
    params: Params,
    batches: Callable[[int], Iterable[dict[str, np.ndarray]]],
    settings: PretrainSettings,
    *,
    dtype: str = "float32",
    checkpoints: Checkpoints | None = None,
    tx: optax.GradientTransformation | None = None,
    track: Callable[..., Any] = iter,
    record: Callable[[int, dict[str, float], float | None], dict[str, float]] = lambda step, figures, tflop: figures,
    sample: Callable[[int, Trainable], None] | None = None,
    profile: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Trainable:
    """Encoder and offsets after `settings.steps` steps, on the host; `batches(first)` yields rows of `data.batches` from that
    step on, this process's share of each batch.

    `dtype` is what the base's networks compute in. Goes on from the newest of `checkpoints` where there is one. `tx` takes the
    place of `optimizers.pretraining`. `record` is told of the figures every `settings.watch_every` steps, and of the 10¹²
    operations of a device in a step, and gives those to show; `sample` is called every `settings.sample_every` steps, on every
    process, with what is learned so far; `profile` takes a trace of three steps; `stop` is asked after every step whether to save
    and end there.

    Errors: `UserError` for a batch that does not divide by the devices, and when the loss is not finite; `Stopped`.
    """
    where = layout(settings.parallel, settings.fsdp)
    where.check_divides(settings.batch_size, settings.accumulate)
    tx = tx or optimizers.pretraining(settings.learning_rate, settings.steps)
    step: Any = compile_step(method, clip_features, tx, settings.regularisation, where, settings.accumulate)
    state = _begin(method, settings, tx, where, checkpoints)
    given = where.place(given_of(params, dtype))
    tflop: float | None = None

    def step_on(state: TrainState, given: Given, rows: dict[str, np.ndarray], key: PRNGKeyArray):
        nonlocal tflop
        placed = where.place_rows(rows)
        if tflop is None:  # compiled here, and found compiled by the call
            tflop = tflop_of(step.lower(state, given, placed, key).compile(), settings.accumulate)
        return step(state, given, placed, key)

    run = Run(
        "pretraining",
        settings.steps,
        checkpoints,
        settings.checkpoint_every,
        track,
        settings.watch_every,
        lambda step, figures: record(step, figures, tflop),
        settings.sample_every if sample is not None else 0,
        lambda step, params: None if sample is None else sample(step, where.unplace(params)),
        stop,
    )
    key = jax.random.key(settings.seed + 1)
    stored = where.unplace if where.parallel == "pmap" else lambda state: state
    with profiled(step_on, profile) as watched, contextlib.ExitStack() as held:

        def closed_in_the_end(first: int) -> Iterable[dict[str, np.ndarray]]:
            rows = batches(first)
            held.callback(getattr(rows, "close", lambda: None))  # what reads ahead ends before the process does
            return rows

        return where.unplace(train(run, watched, state, given, closed_in_the_end, key, stored=stored).params)


def _begin(
    method: Method, settings: PretrainSettings, tx: optax.GradientTransformation, where: Layout, checkpoints: Checkpoints | None
) -> TrainState:
    """The state before the first step, or of the newest checkpoint, on the devices."""
    begin = jax.device_get(init_state(init_trainable(method, jax.random.key(settings.seed)), tx))
    if checkpoints is None:
        return where.place(begin)
    if where.parallel == "pmap":
        restored = checkpoints.restore(begin)
        return where.place(begin if restored is None else restored)
    restored = checkpoints.restore(where.shapes(begin))
    return where.place(begin) if restored is None else restored
