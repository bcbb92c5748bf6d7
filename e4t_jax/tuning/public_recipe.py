"""The tuning of the public PyTorch code (mkshing/e4t-diffusion, tuning_e4t.py), step for step.

    picture    one square at a random place along the longer side, mirrored or not: by the toss of a coin
    z_0        one draw from the VAE's posterior for each row of the batch, the same in all steps
    t          uniform, each of its own
    loss       mean (target - U-Net_θ'(z_t, t, τ(prompt(e*))))²  +  λ Σ_batch ‖e*‖²
    trainable  the encoder, every weight of the U-Net and the networks of its offsets; asked for, CLIP's image encoder and the
               text encoder (`--unfreeze_clip_vision`, `--train_text_encoder` there)
    update     gradients clipped to a norm of 1 over all that is trained, AdamW(0.9, 0.999, 1e-8, decay 0.01) at a constant rate

Rate 1.6e-5, batch 16 and 15 steps are that code's defaults; λ = 0.1 and, later, 30 steps are what its README says. Masks are not
used. The networks are those that an imported checkpoint brought (`Domain.networks`). Of a domain that has none, such as one
pretrained here, whose factors no network need be able to say, they start at Δ = 0 on top of its factors.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Float, PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.image_inputs import Encoders
from e4t_jax.objective import ConceptBatch, ConceptWord, Draws, Frozen, LossWeights, Method, Trainable, draw_independently
from e4t_jax.offsets import difference, factors_of_networks
from e4t_jax.tuning.recipe import Framing, Prompts, Recipe, Views, batch_of

LEARNING_RATE, REGULARISATION, STEPS = 1.6e-5, 0.1, 15


@struct.dataclass
class SummedLossWeights(LossWeights):
    """The public code's: λ weighs the squared length of whole words, summed over the batch."""

    def total(self, denoising: Float[Array, ""], word: ConceptWord) -> Float[Array, ""]:
        """The loss: denoising + λ Σ_batch ‖e*‖²."""
        return denoising + self.regularisation * jnp.sum(word.embedding**2)


@struct.dataclass
class PublicRecipe(Recipe):
    """The public code's tuning, of a scope that names its parts."""

    caption: ClassVar[str | None] = "a photo of *s"

    def framing(self, seed: int) -> Framing:
        """A random square, mirrored or not."""
        generator = np.random.default_rng(seed)
        return Framing(float(generator.uniform()), bool(generator.integers(2)))

    def frozen(self, frozen: Frozen) -> Frozen:
        """Without the domain's factors where their networks, which say the same, are trained instead."""
        frozen = frozen if "image_encoder" in self.scope.parts else frozen._replace(image_encoder=None)
        return frozen if frozen.networks is None else frozen._replace(factors=None)

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
        """A draw from the posterior for each row of the batch, and φ_clip of the square that is trained on."""
        keys = jax.random.split(key, self.batch_size)
        # One after the other: the memory is that of one picture.
        latents = jax.lax.map(lambda one: method.base.encode(encoders.vae, picture[None], one)[0], keys)
        clip = method.base.image_encoder.see(encoders.image_encoder, picture[None])[0]
        itself = picture if "image_encoder" in self.scope.parts else None
        return Views(latents, clip, jnp.ones(latents.shape[:3]), itself)

    def draw(self, method: Method, views: Views, prompts: Prompts, key: PRNGKeyArray) -> tuple[ConceptBatch, Draws]:
        """All latents, a prompt for each, timesteps and noise."""
        prompt_key, loss_key = jax.random.split(key)
        prompt = jax.random.randint(prompt_key, (self.batch_size,), 0, prompts[0].shape[0])
        batch = batch_of(views, jnp.arange(self.batch_size), prompts, prompt)
        return batch, draw_independently(method, self.batch_size, loss_key)

    def tx(self, method: Method, frozen: Frozen, trainable: Trainable) -> optax.GradientTransformation:
        """Clipping and AdamW."""
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(self.learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
        )

    def finish(self, frozen: Frozen, trainable: Trainable) -> Trainable:
        """The networks as factors, on top of the domain's own; CLIP's image encoder is folded into the concept already."""
        if trainable.networks is None:
            return trainable
        factors = factors_of_networks(trainable.networks)
        if frozen.networks is not None:
            factors = difference(factors, factors_of_networks(frozen.networks))
        return trainable._replace(factors=factors, networks=None, image_encoder=None)
