"""Domain pretraining: the encoder and the weight offsets learn one domain, the base model stays frozen.

    trainable ← AdamW(trainable, ∇ e4t_loss(trainable, batch, t, ε))

One step function, compiled over a mesh by `jit` (the batch split, the state whole) or by `pmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, PRNGKeyArray

from e4t_jax.backbone import attention_kernels, feature_width
from e4t_jax.errors import UserError
from e4t_jax.objective import ConceptBatch, Frozen, Method, Trainable, e4t_loss
from e4t_jax.offsets import init_factors

PARALLEL = ("jit", "pmap")


@struct.dataclass
class TrainState:
    """What a pretraining step carries."""

    trainable: Trainable
    moments: Any
    step: Array


def init_trainable(method: Method, key: PRNGKeyArray) -> Trainable:
    """An encoder with random weights and offsets of zero."""
    base = method.base
    encoder_key, factor_key = jax.random.split(key)
    clip = jnp.zeros((1, method.encoder.clip_layers, base.clip_width))
    features = jnp.zeros((1, feature_width(base)))
    encoder = method.encoder.init(encoder_key, clip, features, method="unfolded")["params"]
    return Trainable(init_factors(factor_key, attention_kernels(base)), encoder)


def init_state(trainable: Trainable, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(trainable, tx.init(trainable), jnp.zeros((), jnp.int32))


def pretrain_step(
    method: Method,
    tx: optax.GradientTransformation,
    regularisation: float,
    state: TrainState,
    frozen: Frozen,
    batch: ConceptBatch,
    key: PRNGKeyArray,
    *,
    axis: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One update; with `axis`, the mean of the gradients over that `pmap` axis."""
    key = jax.random.fold_in(key, state.step)
    if axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    loss = partial(e4t_loss, method, regularisation=regularisation)
    (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.trainable, frozen, batch, key)
    if axis is not None:
        gradients, metrics = jax.lax.pmean((gradients, metrics), axis)
    updates, moments = tx.update(gradients, state.moments, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    return TrainState(trainable, moments, state.step + 1), metrics


def compile_step(method: Method, tx: optax.GradientTransformation, regularisation: float, parallel: str) -> Callable:
    """`step(state, frozen, batch, key) -> (state, metrics)` for arrays placed by `place`; the state is donated.

    Errors: `UserError` for a `parallel` other than "jit" or "pmap".
    """
    if parallel not in PARALLEL:
        raise UserError(f"--parallel {parallel!r} is unknown; choose one of {', '.join(PARALLEL)}.")
    step = partial(pretrain_step, method, tx, regularisation)
    if parallel == "pmap":
        return jax.pmap(partial(step, axis="devices"), axis_name="devices", in_axes=(0, 0, 0, None), donate_argnums=0)
    return jax.jit(step, donate_argnums=0)


def data_mesh() -> jax.sharding.Mesh:
    """All devices along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def place(tree: Any, parallel: str, *, split: bool) -> Any:
    """A tree on the devices as `compile_step` wants it: whole on each, or with its leading axis split over them.

    Errors: `UserError` when the batch does not divide by the devices.
    """
    count = jax.device_count()
    if split:
        sizes = {len(leaf) for leaf in jax.tree.leaves(tree)}
        if any(size % count for size in sizes):
            raise UserError(f"--batch-size {sizes.pop()} does not divide by {count} devices; choose a multiple of {count}.")
    if parallel == "jit":
        sharding = jax.NamedSharding(data_mesh(), jax.P("data") if split else jax.P())
        return jax.device_put(tree, sharding)
    if split:
        return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), tree)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), tree)


def unplace(tree: Any, parallel: str) -> Any:
    """A whole tree back on the host."""
    return jax.device_get(tree if parallel == "jit" else jax.tree.map(lambda leaf: leaf[0], tree))
