"""Tuning: a few steps on one picture.

    step k:   batch_k ~ views of the picture × prompts × (t, ε)
              trainable ← trainable + tx(∇ e4t_loss(trainable, batch_k))

How a batch is drawn and what tx is, the recipe says (`tuning.recipe`). In a scope whose encoder stays the domain's, E is predicted
once, before the first step, as its mean over a draw of (t, ε) for each view (`Scope.fresh_word`).

The steps are a `lax.scan`; many concepts are this, many times over (`tuning.batching`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.checks import BatchSize, Rate, Seed, TuningSteps, Weight, check_ranges
from e4t_jax.errors import UserError
from e4t_jax.objective import INITIAL_PARTS, Frozen, LossWeights, Method, Trainable, e4t_loss_at, mean_prediction
from e4t_jax.training.loop import init_state, update
from e4t_jax.tuning import public_recipe
from e4t_jax.tuning.public_recipe import PublicRecipe, SummedLossWeights
from e4t_jax.tuning.recipe import Prompts, Recipe, Views
from e4t_jax.tuning.scopes import Scope, find_scope

_SCOPE, _STEPS = "compact", 5
_PUBLIC_SCOPE = "full"  # what the public recipe's concepts are


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """How concepts are tuned."""

    scope: str | None = None
    """What is tuned: compact (kilobytes; where not given), head (the encoder too) or full (all U-Net weights too)."""
    steps: TuningSteps | None = None
    """Tuning steps; 0 uses the encoder alone; where not given 5, and 15 in recipe public."""
    batch_size: BatchSize = 16
    """Draws of a view, a prompt, a timestep and noise in each step."""
    seed: Seed = 0
    """Seed of views, noise and timesteps."""
    mask: Literal["auto", "none", "file"] = "auto"
    """What limits the loss to the concept: an alpha channel or NAME.mask.png beside a picture where there is one (auto), or
    in any case (file), or nothing (none, and in recipe public)."""
    learning_rate: Rate | None = None
    """Share of the weights that the first step moves: the RMS of Δ, and likewise of encoder and U-Net; the scope's own where not
    given. In recipe public AdamW's rate, 1.6e-5 where not given."""
    word_rate: Rate | None = None
    """Share of the domain word's length that the first step of the word's residual moves, in scope compact; the scope's own where
    not given."""
    regularisation: Weight | None = None
    """λ, the weight of the squared length of the word's offset over that of the domain's word; the domain's own where not given.
    In recipe public that of all words of a batch, of their own length; 0.1 where not given."""
    recipe: Literal["e4t", "public"] = "e4t"
    """How: e4t, the recipe of this package; or public, that of the public PyTorch code step for step (AdamW; the encoder, the U-Net
    and the networks of its offsets), to compare with."""
    also: tuple[Literal["image-encoder", "text-encoder"], ...] = ()
    """In recipe public, what of the base is trained too: there, --unfreeze_clip_vision and --train_text_encoder."""

    def filled(self) -> TuneSettings:
        """The same settings, with the scope and the number of steps that hold where none are given.

        Errors: `UserError` for an unknown scope, recipe or mask, numbers out of range, and what does not go with the recipe.
        """
        check_ranges(self)
        if self.recipe == "public":
            self._check_public()
            return dataclasses.replace(self, scope=_PUBLIC_SCOPE, steps=public_recipe.STEPS if self.steps is None else self.steps)
        if self.also:
            raise UserError("only recipe public trains more of the base; leave it out.", "also")
        scope = _SCOPE if self.scope is None else self.scope
        find_scope(scope)
        return dataclasses.replace(self, scope=scope, steps=_STEPS if self.steps is None else self.steps)

    def _check_public(self) -> None:
        if self.scope not in (None, _PUBLIC_SCOPE):
            raise UserError(f"recipe public trains all, as scope full does, and not {self.scope}; leave it out.", "scope")
        unknown = set(self.also) - {"image-encoder", "text-encoder"}
        if unknown:
            raise UserError(f"{min(unknown)!r} is unknown; choose image-encoder, text-encoder or both.", "also")
        if self.word_rate is not None:
            raise UserError("recipe public has no rate for the word alone; leave it out.", "word_rate")
        if self.mask == "file":
            raise UserError("recipe public takes no mask; leave it out.", "mask")

    def recipe_of(self, regularisation: float) -> Recipe:
        """What is to be computed, with the scope's rates and the domain's λ where none is given.

        Args:
            regularisation: The domain's λ.

        Errors: `UserError` as `filled`.
        """
        own = self.filled()
        assert own.scope is not None and own.steps is not None
        kind, scope, loss_weights = Recipe, find_scope(own.scope), LossWeights
        if own.recipe == "public":
            also = tuple(sorted(part.replace("-", "_") for part in set(own.also)))
            scope = Scope(parts=("networks", "encoder", "unet", *also), rank=0, learning_rate=public_recipe.LEARNING_RATE)
            kind, loss_weights, regularisation = PublicRecipe, SummedLossWeights, public_recipe.REGULARISATION
        return kind(
            scope=scope,
            steps=own.steps,
            batch_size=own.batch_size,
            learning_rate=scope.learning_rate if own.learning_rate is None else own.learning_rate,
            word_rate=scope.word_rate if own.word_rate is None else own.word_rate,
            weights=loss_weights(regularisation if own.regularisation is None else own.regularisation),
        )

    def used(self, recipe: Recipe) -> dict[str, Any]:
        """The settings as plain data, with what a recipe of them computes with in the place of what was not given.

        Args:
            recipe: Made of these settings.

        Errors: none.
        """
        rates = {"learning_rate": float(recipe.learning_rate), "word_rate": float(recipe.word_rate)}
        return {**dataclasses.asdict(self.filled()), **rates, "regularisation": float(recipe.weights.regularisation)}


def start(method: Method, frozen: Frozen, scope: Scope, key: PRNGKeyArray) -> Trainable:
    """The parts that a scope trains, before the first step (`objective.INITIAL_PARTS`)."""
    return Trainable(**{part: INITIAL_PARTS[part](method, frozen, scope, key) for part in scope.parts})


def tune_one(
    method: Method, frozen: Frozen, views: Views, prompts: Prompts, *, key: PRNGKeyArray, recipe: Recipe
) -> tuple[Trainable, Float[Array, " steps"]]:
    """One concept after `recipe.steps` steps on the E4T loss, and the loss before each of them."""
    start_key, draw_key = jax.random.split(key)
    keys = jax.random.split(draw_key, recipe.steps + 1)
    trainable = start(method, frozen, recipe.scope, start_key)
    tx = recipe.tx(method, frozen, trainable)
    predicted = None
    if not recipe.scope.fresh_word:
        predicted = mean_prediction(method, frozen, views.latents, views.clip, keys[-1])

    def loss(trainable, frozen, drawn, _):
        batch, draws = drawn
        if views.picture is not None:
            clip = features_of(method, trainable, views)
            batch = batch._replace(clip=jnp.broadcast_to(clip, batch.clip.shape))
        return e4t_loss_at(method, trainable, frozen, batch, draws, weights=recipe.weights, predicted=predicted)

    def step(state, step_key):
        drawn = recipe.draw(method, views, prompts, step_key)
        state, metrics = update(loss, tx, state, frozen, drawn, key=step_key)
        return state, metrics["loss"]

    state, losses = jax.lax.scan(step, init_state(trainable, tx), keys[:-1])
    return state.params, losses


def features_of(method: Method, trainable: Trainable, views: Views) -> Float[Array, "states clip_width"]:
    """φ_clip of the picture, through the concept's image encoder where it has one of its own."""
    if trainable.image_encoder is None or views.picture is None:
        return views.clip
    return method.base.image_encoder.see(trainable.image_encoder, views.picture[None])[0]
