"""How the networks compute, in one place: precision, rematerialisation, attention, and where weights that are split over devices
are gathered. None of it changes the weights' tree."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
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
        """The class of a block, rematerialised where the policy says so.

        Weights that are split over the mesh (`gather`) are whole within the block alone, and again for its gradient.
        """
        if _is_split():
            kind = _gathered(kind)
        return nn.remat(kind) if self.remat == "blocks" else kind


_SPLIT = "fsdp"  # the axis of the mesh that weights are split over


def _is_split() -> bool:
    return jax.sharding.get_abstract_mesh().shape.get(_SPLIT, 1) > 1


def gather(weights: Any) -> Any:
    """Weights, whole on every device where the mesh that is set has an axis "fsdp" that they may be split over.

    Every call gathers anew. Without the barrier the compiler would see that two passes, or a pass and its gradient, gather the
    same, and keep it for both.
    """
    return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(weights), jax.P()) if _is_split() else weights


def _gathered(kind: Any) -> Any:
    """A block whose weights are gathered when its input is there, and no sooner."""
    inputs: list[Any] = []

    def late(weights: Any) -> Any:
        return gather(jax.lax.optimization_barrier((weights, inputs[-1]))[0])

    mapped = nn.map_variables(kind, "params", late, init=True)

    class Gathered(mapped):  # type: ignore[misc, valid-type]
        def __call__(self, x: Any, *others: Any) -> Any:
            inputs.append(x)
            try:
                return super().__call__(x, *others)
            finally:
                inputs.pop()

    return Gathered


DEFAULT = Policy()
