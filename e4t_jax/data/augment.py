"""Views of one picture: the picture itself, flips, and crops that lose at most a tenth of a side."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from e4t_jax.arrays import Array

_LARGEST_ZOOM = 1.12


def make_views(
    image: Float[Array, "height width 3"], mask: Float[Array, "height width"], key: PRNGKeyArray, count: int
) -> tuple[Float[Array, "views height width 3"], Float[Array, "views height width"]]:
    """`count` views of a picture in [-1, 1] and of its mask; the first is the picture itself, every second is flipped."""
    layers = jnp.concatenate([image, mask[..., None]], axis=-1)
    height, width = mask.shape

    def crop(index, one_key):
        zoom_key, shift_key = jax.random.split(one_key)
        still = index == 0
        zoom = jnp.where(still, 1.0, jax.random.uniform(zoom_key, (), minval=1.0, maxval=_LARGEST_ZOOM))
        room = (zoom - 1.0) * jnp.array([height, width])
        shift = -room * jax.random.uniform(shift_key, (2,))
        view = jax.image.scale_and_translate(
            layers, layers.shape, (0, 1), jnp.stack([zoom, zoom]), translation=shift, method="linear", antialias=False
        )
        return jnp.where(index % 2 == 1, view[:, ::-1], view)

    views = jax.vmap(crop)(jnp.arange(count), jax.random.split(key, count))
    return jnp.clip(views[..., :3], -1, 1), jnp.clip(views[..., 3], 0, 1)
