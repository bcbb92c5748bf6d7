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

A kernel may be a stack of them, [*stack, in, out], and so may its rows and columns. Another form of Δ is a row of
`FORMS`, which a scope may name; all else knows offsets by the functions of this module.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.errors import UserError

# "down_blocks_0/…/attn1/to_q" -> the tensors of a form: {"rows": [*stack, in, rank], "columns": [*stack, out, rank]}
Factors = dict[str, dict[str, Array]]
Shape = tuple[int, ...]
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


class Form(NamedTuple):
    """A form of the offsets of one kernel, by the names of the tensors that hold it; no two forms have the same names."""

    tensors: tuple[str, ...]
    init: Callable[[PRNGKeyArray, Shape, int], dict[str, Array]]  # (key, kernel's shape, rank) -> tensors of Δ = 0
    delta: Callable[[Mapping[str, Array]], Array]  # the tensors -> Δ, of the kernel's shape
    unit_steps: Callable[[Mapping[str, Array]], dict[str, float]]  # as `unit_steps`, of one kernel


def _init_low_rank(key: PRNGKeyArray, kernel: Shape, rank: int) -> dict[str, Array]:
    *stack, rows, columns = kernel
    return {"rows": jax.random.normal(key, (*stack, rows, rank)), "columns": jnp.zeros((*stack, columns, rank))}


def _low_rank_delta(tensors: Mapping[str, Array]) -> Float[Array, "*stack in out"]:
    return tensors["rows"] @ tensors["columns"].swapaxes(-1, -2)


def _low_rank_unit_steps(tensors: Mapping[str, Array]) -> dict[str, float]:
    return {name: math.prod(leaf.shape[:-1]) ** 0.5 for name, leaf in tensors.items()}


LOW_RANK = "low-rank"
FORMS: dict[str, Form] = {LOW_RANK: Form(("rows", "columns"), _init_low_rank, _low_rank_delta, _low_rank_unit_steps)}


def init_factors(key: PRNGKeyArray, kernels: Mapping[Any, Any], rank: int = 3, form: str = LOW_RANK) -> Factors:
    """Offsets Δ = 0 for kernels [*stack, in, out] given by path, as arrays or their shapes: rows ~ N(0, 1), columns = 0.

    As in the paper, and yet the columns feel a gradient at once: ∂Δ/∂columns = rows ≠ 0.

    Args:
        key: Where the rows come from, with a key of its own for each kernel in the order of names.
        kernels: Path -> kernel, or its shape.
        rank: Of forms that have one.
        form: A row of `FORMS`.
    """
    shapes = {_name(path): tuple(getattr(kernel, "shape", kernel)) for path, kernel in kernels.items()}
    names = sorted(shapes)
    keys = jax.random.split(key, len(names))
    made: dict[str, dict[str, Array]] = {}
    # Those of one shape are drawn together, which is less to compile.
    for shape in sorted(set(shapes.values())):
        alike = [index for index, name in enumerate(names) if shapes[name] == shape]
        drawn = jax.vmap(lambda one, shape=shape: FORMS[form].init(one, shape, rank))(keys[np.array(alike)])
        made |= {names[index]: {side: leaf[place] for side, leaf in drawn.items()} for place, index in enumerate(alike)}
    return {name: made[name] for name in names}


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
    """Low-rank factors of Δ - Δ', exactly: the ranks add up. Both hold the same kernels."""

    def joined(name: str, side: str, sign: float) -> Array:
        return jnp.concatenate([factors[name][side], sign * others[name][side]], axis=-1)

    return {name: {"rows": joined(name, "rows", 1), "columns": joined(name, "columns", -1)} for name in factors}


def unit_steps(factors: Factors) -> dict[str, dict[str, float]]:
    """For every tensor of factors, the length of a change that moves Δ by as much as the weights are wide: an RMS of 1.

    With rows ~ N(0, 1), Δ of rank 1 has the RMS ‖columns‖ / √out. A change of the rows by √in turns them by about their own length.
    """
    return {name: _form_of(tensors).unit_steps(tensors) for name, tensors in factors.items()}


def delta(tensors: Mapping[str, Array]) -> Float[Array, "*stack in out"]:
    """The offsets of one kernel: Δ = rows columnsᵀ.

    Errors: `UserError` for tensors of no known form.
    """
    return _form_of(tensors).delta(tensors)


def misfit(factors: Any, kernels: Mapping[str, Any] | None = None) -> str | None:
    """The first kernel whose offsets are of no known form, or of another shape than it has; None where all fit.

    Args:
        factors: Kernel's name -> tensors, as read from a file: it may be anything.
        kernels: Kernel's name -> kernel or its shape and dtype; where not given, any shape will do.
    """
    for name, tensors in factors.items():
        try:
            shape = jax.eval_shape(delta, tensors).shape
        except (UserError, TypeError, ValueError, AttributeError, LookupError):  # whatever a form makes of what is none of it
            return name
        if kernels is not None and (name not in kernels or kernels[name].shape != shape):
            return name
    return None


def layout(tensors: Mapping[str, Array]) -> list[int]:
    """What the shapes of low-rank factors follow from: [*stack, in, out, rank]."""
    return [*jax.eval_shape(_low_rank_delta, tensors).shape, tensors["rows"].shape[-1]]


def shapes_of(layout: Sequence[int]) -> dict[str, Shape]:
    """The shapes of low-rank factors, rows first, from their `layout`.

    Errors: `ValueError` for fewer than three numbers.
    """
    *stack, rows, columns, rank = layout
    return {"rows": (*stack, rows, rank), "columns": (*stack, columns, rank)}


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


def _form_of(tensors: Mapping[str, Any]) -> Form:
    for form in FORMS.values():
        if set(form.tensors) == set(tensors):
            return form
    raise UserError(f"Weight offsets of {', '.join(sorted(tensors))} are of no known form; update e4t-jax.")


def _name(path: Sequence[str] | str) -> str:
    """The key of a kernel among `Factors`: its path without the closing "kernel" that every path shares."""
    return (path if isinstance(path, str) else "/".join(path)).removesuffix("/kernel")
