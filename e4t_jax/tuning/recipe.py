"""What tuning computes: how it sees a picture, what it draws for a step, by what it is updated, what is kept in the end.

step k:   (batch, t, ε)_k  ← recipe.draw(views)
          trainable        ← recipe.tx(trainable, ∇ e4t_loss_at(trainable, batch_k, t_k, ε_k))

A recipe is a pytree: other rates and weights of the loss need no new compilation; all else does. `tuning.public_recipe` is another.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.data.augment import make_views
from e4t_jax.image_inputs import Encoders, encode_pictures
from e4t_jax.objective import ConceptBatch, Draws, Frozen, LossWeights, Method, Trainable, domain_word, draw_timesteps_and_noise
from e4t_jax.training import optimizers
from e4t_jax.tuning.scopes import Scope

Prompts = tuple[Int[Array, "prompts length"], Bool[Array, "prompts length"]]
_VIEWS = 6


class Views(NamedTuple):
    """What tuning sees of one picture: itself and its augmentations, as latents."""

    latents: Float[Array, "views y x channels"]
    clip: Float[Array, "states clip_width"]  # φ_clip of the picture itself
    mask: Float[Array, "views y x"]  # ones where nothing is masked
    picture: Float[Array, "h w 3"] | None = None  # itself, where the image encoder learns


class Framing(NamedTuple):
    """Which square of a picture is taken."""

    place: float | None = None  # along its longer side, from 0 to 1; the middle, or that of its mask, where not given
    is_mirrored: bool = False


@struct.dataclass
class Recipe:
    """E4T's own: views of the picture, timesteps spread over the schedule, NovoGrad at falling rates."""

    scope: Scope = struct.field(pytree_node=False)
    steps: int = struct.field(pytree_node=False)
    batch_size: int = struct.field(pytree_node=False)
    learning_rate: float | Float[Array, ""]
    word_rate: float | Float[Array, ""]
    weights: LossWeights

    caption: ClassVar[str | None] = None  # of a picture that comes without; it is read off the picture where there is none

    def framing(self, seed: int) -> Framing:
        """Which square of a picture is read from its file."""
        return Framing()

    def frozen(self, frozen: Frozen) -> Frozen:
        """A domain's weights as this recipe wants them, of those and what learning may begin with."""
        return frozen._replace(networks=None, image_encoder=None)

    def see(
        self,
        method: Method,
        encoders: Encoders,
        picture: Float[Array, "h w 3"],
        mask: Float[Array, "h w"],
        *,
        whole: Float[Array, "s s 3"] | None = None,
        key: PRNGKeyArray,
    ) -> Views:
        """A picture's views as latents, and φ_clip of the picture itself, or of `whole` where the domain sees that."""
        images, masks = make_views(picture, mask, key, _VIEWS)
        seen = picture if whole is None else whole
        latents, clip, small = encode_pictures(method.base, encoders, images, masks, seen=seen[None])
        return Views(latents, clip[0], small)

    def draw(self, method: Method, views: Views, prompts: Prompts, key: PRNGKeyArray) -> tuple[ConceptBatch, Draws]:
        """A step's batch, its timesteps and its noise."""
        view_key, prompt_key, loss_key = jax.random.split(key, 3)
        batch = draw_batch(views, prompts, self.batch_size, view_key=view_key, prompt_key=prompt_key)
        return batch, draw_timesteps_and_noise(method, self.batch_size, loss_key)

    def tx(self, method: Method, frozen: Frozen, trainable: Trainable) -> optax.GradientTransformation:
        """What turns gradients into changes."""
        unit = jnp.linalg.norm(domain_word(method, frozen.text_encoder)) / method.scale
        lengths = optimizers.step_lengths(trainable, learning_rate=self.learning_rate, word_rate=self.word_rate, word_unit=unit)
        return optimizers.tuning(trainable, lengths, self.steps)

    def finish(self, frozen: Frozen, trainable: Trainable) -> Trainable:
        """What a concept keeps of what was trained."""
        return trainable


def draw_batch(
    views: Views, prompts: Prompts, batch_size: int, *, view_key: PRNGKeyArray, prompt_key: PRNGKeyArray
) -> ConceptBatch:
    """`batch_size` draws of a view and a prompt."""
    which = jax.random.randint(view_key, (batch_size,), 0, views.latents.shape[0])
    return batch_of(views, which, prompts, jax.random.randint(prompt_key, (batch_size,), 0, prompts[0].shape[0]))


def batch_of(views: Views, which: Int[Array, " batch"], prompts: Prompts, prompt: Int[Array, " batch"]) -> ConceptBatch:
    """The views and the prompts of those numbers, as the loss sees them."""
    clip = jnp.broadcast_to(views.clip, (len(which), *views.clip.shape))
    return ConceptBatch(views.latents[which], clip, *prompts, mask=views.mask[which], prompt=prompt)
