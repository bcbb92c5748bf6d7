"""From pictures to what the method computes with: latents, φ_clip and the mask at the latents' resolution.

Pure, to be run where the pictures lie: on a batch that is spread over devices, every device encodes its own share.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.bases import Base, Params


class Encoders(NamedTuple):
    """Weights of the two networks that pictures go through."""

    vae: Params
    image_encoder: Params


class Encoded(NamedTuple):
    """A batch of pictures, encoded."""

    latents: Float[Array, "batch y x channels"]  # z_0, the posterior's mean, scaled
    clip: Float[Array, "pictures states clip_width"]  # φ_clip
    mask: Float[Array, "batch y x"]


def encode_pictures(
    base: Base,
    weights: Encoders,
    images: Float[Array, "batch h w 3"],
    masks: Float[Array, "batch h w"],
    *,
    seen: Float[Array, "pictures h w 3"] | None = None,
) -> Encoded:
    """Latents and masks of `images`, and φ_clip of the same pictures, or of those in `seen`; pictures in [-1, 1]."""
    latents = base.encode(weights.vae, images)
    clip = base.image_encoder.see(weights.image_encoder, images if seen is None else seen)
    return Encoded(latents, clip, shrink_mask(masks, latents.shape[1]))


def shrink_mask(mask: Float[Array, "batch h w"], size: int) -> Float[Array, "batch size size"]:
    """The mask at the latents' resolution: the share of every latent's pixels that it covers."""
    count, height, width = mask.shape
    return mask.reshape(count, size, height // size, size, width // size).mean(axis=(2, 4))
