"""Pictures resized as PyTorch's bicubic interpolation with aligned corners does, without antialiasing: the public E4T code's way.

    x = i (n − 1) / (m − 1),    y_i = Σ_k w(x − k) x_k,    k = ⌊x⌋ − 1 … ⌊x⌋ + 2

w is Keys' cubic kernel (1981) with a = −0.75; beyond the edge, x_k is the edge's.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from e4t_jax.arrays import Array

_CUBIC = -0.75  # a


def resize_bicubic(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b size size c"]:
    """Pictures at `size` as PyTorch's bicubic interpolation with aligned corners makes them: a = -0.75, no antialiasing.

    Every new row is a sum of four old ones, those beyond the edge being the edge's; columns likewise.
    """
    rows, columns = (jnp.asarray(bicubic_weights(length, size)) for length in images.shape[1:3])
    return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, images, precision="highest")


def bicubic_weights(length: int, size: int) -> Float[np.ndarray, "size length"]:
    """What each of `size` new pixels takes of each of `length` old ones, along one side: four weights a row, the rest 0."""
    # Positions in float32, as PyTorch has them: at 512 pixels the difference to exact ones would be seen in the result.
    step = np.float32((length - 1) / (size - 1) if size > 1 else 0)
    places = step * np.arange(size, dtype=np.float32)
    first = np.floor(places).astype(int)
    weights = np.zeros((size, length), np.float32)
    for tap in range(-1, 3):
        distance = np.abs(places - (first + tap)).astype(np.float64)
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
        far = _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
        np.add.at(weights, (np.arange(size), np.clip(first + tap, 0, length - 1)), np.where(distance <= 1, near, far))
    return weights
