"""Arrays of signatures (JAX's functions take NumPy's as readily as their own), and the generator of random ones."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = jax.Array | np.ndarray


def same_generator() -> AbstractContextManager[Any]:
    """In this context programs draw the same random numbers whatever `JAX_THREEFRY_PARTITIONABLE` is set to."""
    return jax.threefry_partitionable(True)
