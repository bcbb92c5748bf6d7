"""Optimisers as values: what each of the trainings here uses where a caller passes no `tx` of his own."""

from __future__ import annotations

import jax
import optax
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.objective import Trainable

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


def tuning(trainable: Trainable, learning_rate: Rate, word_rate: Rate, steps: int) -> optax.GradientTransformation:
    """NovoGrad (arXiv 1905.11286) with two rates, of the word's residual and of all else; both fall linearly.

    It scales a gradient by its length as a whole, not entry by entry as Adam does: in five steps Adam moves every entry of the
    word alike, its noise with its signal. So a rate is the length of the first step.
    """
    falling = {
        part: optax.linear_schedule(rate, rate / steps, steps) for part, rate in (("weights", learning_rate), ("word", word_rate))
    }
    labels = jax.tree.map(lambda _: "weights", trainable)
    labels = labels._replace(residual=None if trainable.residual is None else "word")
    return optax.multi_transform({part: optax.novograd(rate, b1=0.9, b2=0.25, eps=1e-8) for part, rate in falling.items()}, labels)
