"""Domain pretraining: the encoder and the weight offsets learn one domain, the base model stays frozen.

    trainable ← AdamW(trainable, ∇ e4t_loss(trainable, batch, t, ε))

Pictures are encoded where the batch lies, on every device its own share, in the same compiled step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from e4t_jax.objective import ConceptBatch, Frozen, Method, Trainable, e4t_loss
from e4t_jax.offsets import init_factors
from e4t_jax.training import optimizers
from e4t_jax.training.checkpoints import Checkpoints
from e4t_jax.training.loop import Run, TrainState, init_state, step_of, train
from e4t_jax.training.parallel import axis_of, check_divides, place, spread, unplace


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
    checkpoint_every: int = 500
    """Steps from one checkpoint to the next."""
    seed: int = 0
    """Seed of the weights, the order of the pictures and the noise."""


class Given(NamedTuple):
    """What a step reads and never changes: of the method, and of the encoding of pictures."""

    frozen: Frozen
    encoders: Encoders


def init_trainable(method: Method, key: PRNGKeyArray) -> Trainable:
    """An encoder with random weights and offsets of zero."""
    base = method.base
    encoder_key, factor_key = jax.random.split(key)
    clip = jnp.zeros((1, method.encoder.clip_layers, base.clip_width))
    features = jnp.zeros((1, base.feature_width))
    encoder = method.encoder.init(encoder_key, clip, features, method="unfolded")["params"]
    return Trainable(init_factors(factor_key, base.offset_kernels(base.param_shapes()["unet"])), encoder)


def concept_batch(method: Method, clip_features: str, encoders: Encoders, rows: dict[str, Array]) -> ConceptBatch:
    """Rows of `data.batches` as the loss sees them."""
    latents, clip, mask = encode_pictures(method.base, clip_features, encoders, rows["image"], rows["mask"])
    return ConceptBatch(latents, clip, rows["ids"], rows["placeholder"], mask)


def compile_step(
    method: Method, clip_features: str, tx: optax.GradientTransformation, regularisation: float, parallel: str
) -> Callable[[TrainState, Given, dict[str, Array], PRNGKeyArray], tuple[TrainState, dict[str, Array]]]:
    """`step(state, given, rows, key) -> (state, metrics)` over all devices, for arguments placed by `place`; donates the state.

    Errors: `UserError` for a `parallel` other than "jit" or "pmap".
    """

    def loss(trainable: Trainable, given: Given, batch: ConceptBatch, key: PRNGKeyArray):
        return e4t_loss(method, trainable, given.frozen, batch, key, regularisation=regularisation)

    step = step_of(loss, tx, axis=axis_of(parallel))

    def encode_and_step(state: TrainState, given: Given, rows: dict[str, Array], key: PRNGKeyArray):
        return step(state, given, concept_batch(method, clip_features, given.encoders, rows), key)

    return spread(encode_and_step, parallel, (False, False, True, None), donate=0)


def pretrain_trainable(
    method: Method,
    clip_features: str,
    params: Params,
    batches: Callable[[int], Iterable[dict[str, np.ndarray]]],
    settings: PretrainSettings,
    *,
    checkpoints: Checkpoints | None = None,
    tx: optax.GradientTransformation | None = None,
    track: Callable[..., Any] = iter,
    stop: Callable[[], bool] = lambda: False,
) -> Trainable:
    """Encoder and offsets after `settings.steps` steps; `batches(first)` yields rows of `data.batches` from that step on.

    Goes on from the newest of `checkpoints` where there is one. `tx` takes the place of `optimizers.pretraining`. `stop` is asked
    after every step whether to save and end there.

    Errors: `UserError` for a batch that does not divide by the devices, and when the loss is not finite; `Stopped`.
    """
    parallel = settings.parallel
    check_divides(settings.batch_size)
    tx = tx or optimizers.pretraining(settings.learning_rate, settings.steps)
    step = compile_step(method, clip_features, tx, settings.regularisation, parallel)
    state = init_state(init_trainable(method, jax.random.key(settings.seed)), tx)
    if checkpoints is not None:
        restored = checkpoints.restore(jax.tree.map(jnp.asarray, state))
        state = state if restored is None else restored
    # By way of the host: the step donates its state, and whatever else holds these arrays must survive that.
    state = place(jax.device_get(state), parallel, split=False)
    given = Given(Frozen(params["unet"], params["text_encoder"]), Encoders(params["vae"], params["image_encoder"]))
    run = Run("pretraining", settings.steps, checkpoints, settings.checkpoint_every, track, stop=stop)
    state = train(
        run,
        lambda state, given, rows, key: step(state, given, place(rows, parallel, split=True), key),
        state,
        place(given, parallel, split=False),
        batches,
        jax.random.key(settings.seed + 1),
        host=lambda state: unplace(state, parallel),
    )
    return unplace(state, parallel).params
