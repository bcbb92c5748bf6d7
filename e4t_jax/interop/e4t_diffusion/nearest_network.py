"""The offset network of the public code that says given factors: exactly where there is one, else the nearest.

With p = A vx, q = C vy and e = C 1, a network says (`offsets`)

    Δ = p qᵀ + b eᵀ + 1 dᵀ                                 p, b [in];  q, e, d [out]

where all five are free and the ones are not. So it can say exactly those Δ for which P Δ has rank 2 or less, P = I - 1 1ᵀ / in
being what takes every column's mean away. Learned factors of rank 3 are free in all three rows, so their P Δ has rank 3. As the
two parts of Δ = P Δ + 1 (Δᵀ 1 / in)ᵀ are orthogonal, the nearest in squares has

    d = Δᵀ 1 / in        p qᵀ + b eᵀ = s₁ u₁ w₁ᵀ + s₂ u₂ w₂ᵀ        P Δ = Σ_i s_i u_i w_iᵀ

and misses s₃. What it misses can be made up for by the kernel: W̃ = W ⊙ (1 + Δ) / (1 + Δ̂) gives W̃ ⊙ (1 + Δ̂) = W ⊙ (1 + Δ).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.offsets import OffsetNetwork, delta, factors_of_network

_LEAST = 0.1  # of 1 + Δ̂, which a kernel is divided by


def nearest_network(factors: Mapping[str, Array]) -> OffsetNetwork:
    """The network whose Δ̂ is nearest to Δ = rows columnsᵀ in squares; equal to it, to rounding, where one is.

    Args:
        factors: Of one kernel: rows [in, rank], columns [out, rank].
    """
    rows, columns = (np.asarray(factors[side], np.float64) for side in ("rows", "columns"))
    (left, right), mean = _two_parts(rows - rows.mean(axis=0), columns), columns @ rows.mean(axis=0)
    inputs, outputs = len(rows), len(columns)
    # vy sums to nothing, so that C = q vyᵀ + e 1ᵀ / out says q for vy and e for the ones.
    ramp = np.linspace(-1, 1, outputs) if outputs > 1 else np.ones(1)
    vy = ramp / np.linalg.norm(ramp)
    parts = {
        "v": np.ones(1),
        "linear1_weight": left[:, :1],
        "linear1_bias": np.zeros(inputs),
        "linear2_weight": vy[:, None],
        "linear2_bias": np.zeros(outputs),
        "column_weight": np.eye(inputs),
        "column_bias": left[:, 1],
        "row_weight": np.outer(right[:, 0], vy) + right[:, 1:] / outputs,
        "row_bias": mean,
    }
    return OffsetNetwork(**{name: jnp.asarray(part, jnp.float32) for name, part in parts.items()})


def bounded(network: OffsetNetwork) -> OffsetNetwork:
    """The network with all of Δ̂ scaled down where it would fall below -0.9 somewhere: a kernel can be divided by 1 + Δ̂."""
    lowest = float(delta(factors_of_network(network)).min())
    kept = min(1.0, (1 - _LEAST) / max(-lowest, 1e-30))
    return network._replace(row_weight=kept * network.row_weight, row_bias=kept * network.row_bias)


def _two_parts(
    rows: Float[np.ndarray, "in rank"], columns: Float[np.ndarray, "out rank"]
) -> tuple[Float[np.ndarray, "in 2"], Float[np.ndarray, "out 2"]]:
    """The first two singular parts of rows columnsᵀ, each side with the root of the size; at O(n rank²)."""
    (q_rows, r_rows), (q_columns, r_columns) = np.linalg.qr(rows), np.linalg.qr(columns)
    left, sizes, right = np.linalg.svd(r_rows @ r_columns.T)
    roots = np.sqrt(sizes[:2])
    fill = ((0, 0), (0, 2 - len(roots)))
    return np.pad(q_rows @ left[:, :2] * roots, fill), np.pad(q_columns @ right[:2].T * roots, fill)


def making_up(
    kernel: Float[Array | np.ndarray, "in out"],
    wanted: Float[Array | np.ndarray, "in out"],
    said: Float[Array | np.ndarray, "in out"],
) -> Float[np.ndarray, "in out"]:
    """W̃ = W ⊙ (1 + Δ) / (1 + Δ̂): the kernel that the network's Δ̂ turns into W ⊙ (1 + Δ)."""
    return np.asarray(kernel, np.float32) * (1 + np.asarray(wanted, np.float32)) / (1 + np.asarray(said, np.float32))
