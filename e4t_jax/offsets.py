"""Regularised weight offsets: how E4T changes the attention of a U-Net that otherwise stays frozen.

Each q, k and v projection W [in, out] of every self- and cross-attention layer is scaled entry by entry
(Gal et al. 2023, arXiv 2302.12228):

    W' = W ⊙ (1 + Δ)

The paper predicts Δ with a small network from one learned number v. With vx = Linear1(v) [in] and
vy = Linear2(v) [out], their outer product passes a linear layer (A, b) over its rows and one (C, d) over its
columns:

    M = A (vx vyᵀ) + b 1ᵀ             [in, out]
    Δ = M Cᵀ + 1 dᵀ                   [in, out], at O(n³)

Nothing in it is nonlinear, so it multiplies out, exactly, to three outer products at O(n²):

    Δ = (A vx)(C vy)ᵀ + b (C 1)ᵀ + 1 dᵀ

Hence whatever the network can say, rank-3 *factors* can: Δ = rows columnsᵀ. Factors are what this library
learns, stores and merges; `factors_of_network` brings the paper's own parametrisation into this form.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.errors import UserError

# "down_blocks_0/…/attn1/to_q" -> {"rows": [in, rank], "columns": [out, rank]}
Factors = dict[str, dict[str, Array]]
Networks = dict[str, "OffsetNetwork"]  # by the same names


class OffsetNetwork(NamedTuple):
    """The paper's network for the offsets of one kernel [in, out]; a linear layer is x ↦ weight x + bias."""

    v: Float[Array, "1"]
    linear1_weight: Float[Array, "in 1"]
    linear1_bias: Float[Array, "in"]
    linear2_weight: Float[Array, "out 1"]
    linear2_bias: Float[Array, "out"]
    column_weight: Float[Array, "in in"]  # A
    column_bias: Float[Array, "in"]  # b
    row_weight: Float[Array, "out out"]  # C
    row_bias: Float[Array, "out"]  # d


def init_factors(key: PRNGKeyArray, kernels: Mapping[Any, Any], rank: int = 3) -> Factors:
    """Factors for kernels [in, out] given by path, as arrays or their shapes: rows ~ N(0, 1), columns = 0.

    Δ = 0 at the start, as in the paper, and yet the columns feel a gradient at once: ∂Δ/∂columns = rows ≠ 0.
    """
    shapes = {_name(path): getattr(kernel, "shape", kernel) for path, kernel in kernels.items()}
    names = sorted(shapes)
    keys = jax.random.split(key, len(names))
    rows: dict[str, Array] = {}
    # A key for each kernel; those of one length are drawn together, which is less to compile.
    for length in sorted({shapes[name][0] for name in names}):
        alike = [index for index, name in enumerate(names) if shapes[name][0] == length]
        drawn = jax.vmap(lambda one, length=length: jax.random.normal(one, (length, rank)))(keys[np.array(alike)])
        rows |= {names[index]: drawn[place] for place, index in enumerate(alike)}
    return {name: {"rows": rows[name], "columns": jnp.zeros((shapes[name][1], rank))} for name in names}


def factors_of_network(network: OffsetNetwork) -> dict[str, Array]:
    """The exact rank-3 factors of the paper's network: rows = [A vx, b, 1], columns = [C vy, C 1, d]."""
    vx = network.linear1_weight @ network.v + network.linear1_bias
    vy = network.linear2_weight @ network.v + network.linear2_bias
    a, b, c, d = network.column_weight, network.column_bias, network.row_weight, network.row_bias
    return {
        "rows": jnp.stack([a @ vx, b, jnp.ones_like(b)], axis=1),
        "columns": jnp.stack([c @ vy, c.sum(axis=1), d], axis=1),
    }


def init_networks(key: PRNGKeyArray, kernels: Mapping[Any, Any]) -> Networks:
    """The paper's networks for kernels [in, out] given by path: v = 1, C = 0 and d = 0, all else ~ U(-1, 1) / √(inputs).

    So Δ = 0, and C and d feel a gradient at once. (PyTorch's layers start at random, C and d too.)
    """

    def draw(key: PRNGKeyArray, *shape: int) -> Array:
        return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / shape[-1] ** 0.5

    networks = {}
    for index, (path, kernel) in enumerate(sorted(kernels.items())):
        rows, columns = kernel.shape
        keys = jax.random.split(jax.random.fold_in(key, index), 6)
        networks[_name(path)] = OffsetNetwork(
            v=jnp.ones(1),
            linear1_weight=draw(keys[0], rows, 1),
            linear1_bias=draw(keys[1], rows, 1)[:, 0],
            linear2_weight=draw(keys[2], columns, 1),
            linear2_bias=draw(keys[3], columns, 1)[:, 0],
            column_weight=draw(keys[4], rows, rows),
            column_bias=draw(keys[5], 1, rows)[0],
            row_weight=jnp.zeros((columns, columns)),
            row_bias=jnp.zeros(columns),
        )
    return networks


def factors_of_networks(networks: Networks) -> Factors:
    """`factors_of_network`, of each of them."""
    return {name: factors_of_network(network) for name, network in networks.items()}


def difference(factors: Factors, others: Factors) -> Factors:
    """Factors of Δ - Δ', exactly: the ranks add up. Both hold the same kernels."""

    def joined(name: str, side: str, sign: float) -> Array:
        return jnp.concatenate([factors[name][side], sign * others[name][side]], axis=1)

    return {name: {"rows": joined(name, "rows", 1), "columns": joined(name, "columns", -1)} for name in factors}


def unit_steps(factors: Factors) -> dict[str, dict[str, float]]:
    """For every tensor of factors, the length of a change that moves Δ by as much as the weights are wide: an RMS of 1.

    With rows ~ N(0, 1), Δ of rank 1 has the RMS ‖columns‖ / √out. A change of the rows by √in turns them by about their own length.
    """
    return jax.tree.map(lambda leaf: leaf.shape[0] ** 0.5, factors)


def delta(factors: Mapping[str, Array]) -> Float[Array, "in out"]:
    """The offsets of one kernel: Δ = rows columnsᵀ."""
    return factors["rows"] @ factors["columns"].T


def merge(unet_params: Mapping[str, Any], *factor_sets: Factors) -> dict[str, Any]:
    """U-Net parameters with offsets applied: W' = W ⊙ (1 + Σ_s Δ_s), over all the factor sets s that name W.

    The sets add up, so a domain's offsets and a concept's own can be kept apart. What no set names is shared
    with `unet_params`, not copied. W' has W's dtype; Δ is summed in the factors' own.

    Errors: `UserError` when a set names a kernel that the U-Net lacks or that has another shape.
    """
    merged = flatten_dict(dict(unet_params), sep="/")
    for name in sorted({name for factors in factor_sets for name in factors}):
        kernel = merged.get(f"{name}/kernel")
        deltas = [delta(factors[name]) for factors in factor_sets if name in factors]
        if kernel is None or any(one.shape != kernel.shape for one in deltas):
            found = "no such kernel" if kernel is None else f"one of shape {tuple(kernel.shape)}"
            raise UserError(
                f"The weight offsets hold {name} of shape {tuple(deltas[0].shape)}, the U-Net has {found}: "
                "they were made for another base model; use the one they were made for."
            )
        merged[f"{name}/kernel"] = (kernel * (1 + sum(deltas))).astype(kernel.dtype)
    return unflatten_dict(merged, sep="/")


def _name(path: Sequence[str] | str) -> str:
    """The key of a kernel among `Factors`: its path without the closing "kernel" that every path shares."""
    return (path if isinstance(path, str) else "/".join(path)).removesuffix("/kernel")
