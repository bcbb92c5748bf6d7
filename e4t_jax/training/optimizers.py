"""Optimisers as values: what each of the trainings here uses where a caller passes no `tx` of his own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.objective import Trainable
from e4t_jax.offsets import unit_steps

Rate = float | Float[Array, ""]


def pretraining(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping; the rate warms up over a hundred steps and falls along a cosine to 0."""
    rate = optax.warmup_cosine_decay_schedule(0, learning_rate, min(100, steps // 5), steps, 0)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01))


def base_model(learning_rate: float, steps: int, *, warmup: int = 300, decay_share: float = 0.3) -> optax.GradientTransformation:
    """AdamW with clipping; the rate warms up, stays, and falls linearly to 2 % over the last `decay_share` of the steps."""
    tail = int(steps * decay_share)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0, learning_rate, warmup),
            optax.constant_schedule(learning_rate),
            optax.linear_schedule(learning_rate, 0.02 * learning_rate, tail),
        ],
        [warmup, steps - tail],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01))


def judge(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW; the rate warms up and falls along a cosine."""
    rate = optax.warmup_cosine_decay_schedule(0, learning_rate, min(100, steps // 5), steps, 1e-5)
    return optax.adamw(rate, weight_decay=0.02)


def tuning(trainable: Trainable, lengths: Trainable, steps: int) -> optax.GradientTransformation:
    """NovoGrad (arXiv 1905.11286) whose first step has, tensor by tensor, the length that `lengths` says; the steps fall linearly.

    It scales a gradient by its length as a whole, not entry by entry as Adam does: in five steps Adam moves every entry of the
    word alike, its noise with its signal.
    """
    falling = optax.linear_schedule(1.0, 1 / steps, steps)
    to_lengths = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, lengths))
    return optax.chain(optax.novograd(falling, b1=0.9, b2=0.25, eps=1e-8), to_lengths)


def step_lengths(trainable: Trainable, *, learning_rate: Rate, word_rate: Rate, word_unit: Rate) -> Trainable:
    """The lengths of `tuning`'s first steps, each a share of what it moves, whatever the widths and the words of a base.

        r                          word_rate · ‖e_d‖ / s       a share of the domain's word
        factors                    learning_rate · √length     the RMS of Δ (`offsets.unit_steps`)
        last layer of the encoder  learning_rate · ‖e_d‖ / s   E has the scale of r
        any other tensor           learning_rate · √out        the length of a kernel that keeps the variance of its input

    Args:
        trainable: What learns.
        learning_rate: Share of all but the word's residual.
        word_rate: Share of the word.
        word_unit: ‖e_d‖ / s, how long r and E are where they move the word by as much as its own length.
    """

    def of_weights(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: learning_rate * leaf.shape[-1] ** 0.5, tree)

    lengths = Trainable(*map(of_weights, trainable))
    if trainable.factors is not None:
        lengths = lengths._replace(factors=jax.tree.map(lambda unit: learning_rate * unit, unit_steps(trainable.factors)))
    if trainable.encoder is not None:
        last = jax.tree.map(lambda _: learning_rate * word_unit, trainable.encoder["final"])
        lengths = lengths._replace(encoder={**lengths.encoder, "final": last})
    return lengths if trainable.residual is None else lengths._replace(residual=jnp.asarray(word_rate * word_unit))
