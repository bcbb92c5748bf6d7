"""How the networks compute, in one place: precision, rematerialisation, attention. None of it changes the weights' tree."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from e4t_jax.arrays import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Norms, softmax and what the networks return are float32.

        dtype      of convolutions, matrix products and what flows between them, and so of the kernels in memory
        remat      "blocks": every residual block and transformer keeps its inputs alone and is run again for its gradient
        attention  "auto": the platform's own kernel where it has one; "xla": the plain form everywhere

    The last two change memory and speed, and numbers by rounding alone.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "blocks"] = "none"
    attention: Literal["auto", "xla"] = "auto"

    def cast(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """`x` in the dtype of computation."""
        return jnp.asarray(x, self.dtype)

    def weight_dtype(self, path: str) -> str:
        """The dtype of a weight in memory: `dtype` for a kernel, which is cast for its product anyway; float32 for all others."""
        return self.dtype if path.endswith("kernel") else "float32"

    def block(self, kind: Any) -> Any:
        """The class of a block, rematerialised where the policy says so."""
        return nn.remat(kind) if self.remat == "blocks" else kind


DEFAULT = Policy()
