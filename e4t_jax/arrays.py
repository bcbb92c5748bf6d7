"""The array of signatures: JAX's functions take NumPy's arrays as readily as their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = jax.Array | np.ndarray
