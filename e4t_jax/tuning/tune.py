"""Tuning: a few steps on one picture.

    step k:   batch_k ~ views of the picture × prompts × (t, ε)
              trainable ← NovoGrad(trainable, ∇ e4t_loss(trainable, batch_k))

In a scope whose encoder stays the domain's, E is predicted once, before the first step, as its mean over a draw of
(t, ε) for each view (`Scope.fresh_word`).

The steps are a `lax.scan`; many concepts are this, many times over (`tuning.batching`).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.checks import BatchSize, Rate, Seed, TuningSteps, Weight, check_ranges
from e4t_jax.objective import INITIAL_PARTS, ConceptBatch, Frozen, LossWeights, Method, Trainable, e4t_loss, mean_prediction
from e4t_jax.training import optimizers
from e4t_jax.training.loop import init_state, update
from e4t_jax.tuning.scopes import Scope, find_scope

Prompts = tuple[Int[Array, "prompts length"], Bool[Array, "prompts length"]]


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """How concepts are tuned."""

    scope: str = "compact"
    """What is tuned: compact (kilobytes), head (the encoder too) or full (all U-Net weights too)."""
    steps: TuningSteps = 5
    """Tuning steps; 0 uses the encoder alone."""
    batch_size: BatchSize = 16
    """Draws of a view, a prompt, a timestep and noise in each step."""
    seed: Seed = 0
    """Seed of views, noise and timesteps."""
    mask: Literal["auto", "none", "file"] = "auto"
    """What limits the loss to the concept: an alpha channel or NAME.mask.png beside a picture where there is one (auto), or
    in any case (file), or nothing (none)."""
    learning_rate: Rate | None = None
    """Length of the first step of each factor, or weight of encoder and U-Net; the scope's own where not given."""
    word_rate: Rate | None = None
    """Length of the first step of the word's residual in scope compact; the scope's own where not given."""
    regularisation: Weight | None = None
    """λ, the weight of the squared length of the word's offset; the domain's own where not given."""

    def recipe(self, regularisation: float) -> Recipe:
        """What is to be computed, with the scope's rates and the domain's λ where none is given.

        Args:
            regularisation: The domain's λ.

        Errors: `UserError` for an unknown scope or mask and for numbers out of range.
        """
        check_ranges(self)
        scope = find_scope(self.scope)
        return Recipe(
            scope=scope,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=scope.learning_rate if self.learning_rate is None else self.learning_rate,
            word_rate=scope.word_rate if self.word_rate is None else self.word_rate,
            weights=LossWeights(regularisation if self.regularisation is None else self.regularisation),
        )


@struct.dataclass
class Recipe:
    """What `tune_one` computes. Other rates and weights of the loss need no new compilation; all else does."""

    scope: Scope = struct.field(pytree_node=False)
    steps: int = struct.field(pytree_node=False)
    batch_size: int = struct.field(pytree_node=False)
    learning_rate: float | Float[Array, ""]
    word_rate: float | Float[Array, ""]
    weights: LossWeights


class Views(NamedTuple):
    """What tuning sees of one picture: itself and its augmentations, as latents."""

    latents: Float[Array, "views y x channels"]
    clip: Float[Array, "states clip_width"]  # φ_clip of the picture itself
    mask: Float[Array, "views y x"]  # ones where nothing is masked


def start(method: Method, frozen: Frozen, scope: Scope, key: PRNGKeyArray) -> Trainable:
    """The parts that a scope trains, before the first step (`objective.INITIAL_PARTS`)."""
    return Trainable(**{part: INITIAL_PARTS[part](method, frozen, scope.rank, key) for part in scope.parts})


def tune_one(
    method: Method, frozen: Frozen, views: Views, prompts: Prompts, *, key: PRNGKeyArray, recipe: Recipe
) -> tuple[Trainable, Float[Array, " steps"]]:
    """One concept after `recipe.steps` steps on the E4T loss, and the loss before each of them."""
    start_key, draw_key = jax.random.split(key)
    keys = jax.random.split(draw_key, recipe.steps + 1)
    trainable = start(method, frozen, recipe.scope, start_key)
    tx = optimizers.tuning(trainable, recipe.learning_rate, recipe.word_rate / method.scale, recipe.steps)
    predicted = None
    if not recipe.scope.fresh_word:
        predicted = mean_prediction(method, frozen, views.latents, views.clip, keys[-1])

    def loss(trainable, frozen, batch, key):
        return e4t_loss(method, trainable, frozen, batch, key, weights=recipe.weights, predicted=predicted)

    def step(state, step_key):
        view_key, prompt_key, loss_key = jax.random.split(step_key, 3)
        batch = draw_batch(views, prompts, recipe.batch_size, view_key=view_key, prompt_key=prompt_key)
        state, metrics = update(loss, tx, state, frozen, batch, key=loss_key)
        return state, metrics["loss"]

    state, losses = jax.lax.scan(step, init_state(trainable, tx), keys[:-1])
    return state.params, losses


def draw_batch(
    views: Views, prompts: Prompts, batch_size: int, *, view_key: PRNGKeyArray, prompt_key: PRNGKeyArray
) -> ConceptBatch:
    """`batch_size` draws of a view and a prompt."""
    which = jax.random.randint(view_key, (batch_size,), 0, views.latents.shape[0])
    ids, placeholder = prompts
    prompt = jax.random.randint(prompt_key, (batch_size,), 0, ids.shape[0])
    clip = jnp.broadcast_to(views.clip, (batch_size, *views.clip.shape))
    return ConceptBatch(views.latents[which], clip, ids, placeholder, mask=views.mask[which], prompt=prompt)
