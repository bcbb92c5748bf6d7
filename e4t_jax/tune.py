"""Tuning: a few steps on one picture, for one concept or for many at once.

    step k:   batch_k ~ views of the picture × prompts × (t, ε)
              trainable ← NovoGrad(trainable, ∇ e4t_loss(trainable, batch_k))

NovoGrad (arXiv 1905.11286) scales a gradient by its length as a whole, not entry by entry as Adam does: in five steps Adam
moves every entry of the word alike, its noise with its signal. The rate is the length of the first step; it falls linearly.

The steps are a `lax.scan`, the concepts a `vmap` over it: one compiled call whatever the number of pictures. All concepts
see the same draws (views, prompts, t, ε), so a concept tuned in a batch is the concept tuned alone.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from e4t_jax.backbone import attention_kernels
from e4t_jax.errors import UserError
from e4t_jax.objective import ConceptBatch, Frozen, Method, Trainable, e4t_loss
from e4t_jax.offsets import init_factors

SCOPES = ("compact", "head", "full")


@struct.dataclass
class TuneSettings:
    """How a concept is tuned; another scope, number of steps or batch size compiles anew, other numbers do not."""

    scope: str = struct.field(pytree_node=False, default="compact")
    steps: int = struct.field(pytree_node=False, default=5)
    batch_size: int = struct.field(pytree_node=False, default=16)
    learning_rate: float = 0.05  # length of a step of each factor, or weight of encoder and U-Net
    word_rate: float = 0.2  # length of a step of the word's residual s r
    regularisation: float = 0.01  # λ


class Views(NamedTuple):
    """What tuning sees of one picture: itself and its augmentations, as latents."""

    latents: Float[Array, "views height width channels"]
    clip: Float[Array, "layers clip_width"]  # φ_clip of the picture itself
    mask: Float[Array, "views height width"]  # ones where nothing is masked


def start(method: Method, frozen: Frozen, scope: str, key: PRNGKeyArray) -> Trainable:
    """The trainable part before the first step: Δ = 0, no residual, the domain's encoder.

    compact   residual r of the word and rank-1 factors; the encoder stays frozen
    head      the encoder and rank-3 factors
    full      the encoder, rank-3 factors and every weight of the U-Net: the paper's literal form

    Errors: `UserError` for another scope.
    """
    if scope not in SCOPES:
        raise UserError(f"--scope {scope!r} is unknown; choose one of {', '.join(SCOPES)}.")
    kernels = attention_kernels(method.base)
    if scope == "compact":
        return Trainable(init_factors(key, kernels, rank=1), residual=jnp.zeros((method.base.text_width,)))
    factors = init_factors(key, kernels)
    return Trainable(factors, encoder=frozen.encoder, unet=frozen.unet if scope == "full" else None)


def tune_one(
    method: Method,
    frozen: Frozen,
    views: Views,
    prompts: tuple[Int[Array, "prompts length"], Bool[Array, "prompts length"]],
    key: PRNGKeyArray,
    settings: TuneSettings,
) -> tuple[Trainable, Float[Array, " steps"]]:
    """One concept after `settings.steps` steps of NovoGrad on the E4T loss, and the loss before each of them."""
    start_key, draw_key = jax.random.split(key)
    trainable = start(method, frozen, settings.scope, start_key)
    rates = {"weights": settings.learning_rate, "word": settings.word_rate / method.scale}
    falling = {part: optax.linear_schedule(rate, rate / settings.steps, settings.steps) for part, rate in rates.items()}
    labels = jax.tree.map(lambda _: "weights", trainable)
    labels = labels._replace(residual=None if trainable.residual is None else "word")
    tx = optax.multi_transform({part: optax.novograd(rate, b1=0.9, b2=0.25, eps=1e-8) for part, rate in falling.items()}, labels)
    loss = partial(e4t_loss, method, regularisation=settings.regularisation)

    def step(carry, step_key):
        trainable, moments = carry
        view_key, prompt_key, loss_key = jax.random.split(step_key, 3)
        batch = draw_batch(views, prompts, view_key, prompt_key, settings.batch_size)
        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch, loss_key)
        updates, moments = tx.update(gradients, moments, trainable)
        return (optax.apply_updates(trainable, updates), moments), value

    carry, losses = jax.lax.scan(step, (trainable, tx.init(trainable)), jax.random.split(draw_key, settings.steps))
    return carry[0], losses


def draw_batch(
    views: Views,
    prompts: tuple[Int[Array, "prompts length"], Bool[Array, "prompts length"]],
    view_key: PRNGKeyArray,
    prompt_key: PRNGKeyArray,
    batch_size: int,
) -> ConceptBatch:
    """`batch_size` draws of a view and a prompt."""
    which = jax.random.randint(view_key, (batch_size,), 0, views.latents.shape[0])
    ids, placeholder = prompts
    said = jax.random.randint(prompt_key, (batch_size,), 0, ids.shape[0])
    clip = jnp.broadcast_to(views.clip, (batch_size, *views.clip.shape))
    return ConceptBatch(views.latents[which], clip, ids[said], placeholder[said], views.mask[which])


@jax.jit
def tune_many(
    method: Method,
    frozen: Frozen,
    views: Views,
    prompts: tuple[Int[Array, "concepts prompts length"], Bool[Array, "concepts prompts length"]],
    key: PRNGKeyArray,
    settings: TuneSettings,
) -> tuple[Trainable, Float[Array, "concepts steps"]]:
    """`tune_one` for many concepts in one compiled call; `views` and `prompts` have a leading axis of concepts."""
    return jax.vmap(lambda v, p: tune_one(method, frozen, v, p, key, settings))(views, prompts)
