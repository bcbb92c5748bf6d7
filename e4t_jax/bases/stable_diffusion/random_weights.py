"""Random weights of a true geometry, for parts that are not at hand: leaf by leaf with NumPy.

Compiling the modules' own initialisers takes longer than a short training.
"""

from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float32

from e4t_jax.bases.formats import Weights
from e4t_jax.bases.protocol import Params

RANDOM = "random:"  # what the name of such weights begins with


def draw_leaf(generator: np.random.Generator, path: str, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """A leaf by the last name of its path: kernels ~ N(0, 1/fan_in), embeddings ~ N(0, 0.02²), scales 1, biases 0.

    Args:
        generator: Where the numbers come from.
        path: Path of the leaf in its tree, parted by "/".
        shape: Its shape; a kernel's last axis is what it gives, all others are its fan-in.

    Errors: none.
    """
    match path.rpartition("/")[2]:
        case "kernel":
            return generator.standard_normal(shape, np.float32) * np.float32(np.prod(shape[:-1]) ** -0.5)
        case "scale":
            return np.ones(shape, np.float32)
        case "bias":
            return np.zeros(shape, np.float32)
        case _:
            return np.float32(0.02) * generator.standard_normal(shape, np.float32)


def drawn_weights(name: str, shapes: Params) -> Weights:
    """A part's weights as if they lay in a file, each drawn when it is read; the same for one name in every process.

    Args:
        name: What the weights are called: "random:vit-h14".
        shapes: The part's tree of shapes.

    Errors: none.
    """

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        return draw_leaf(np.random.default_rng(zlib.crc32(f"{name}/{path}".encode())), path, shape)

    leaves = flatten_dict(shapes, sep="/")
    return Weights(Path(name), {path: partial(draw, path, leaf.shape) for path, leaf in leaves.items()}, flax=True)
