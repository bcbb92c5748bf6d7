"""Attention as Pallas kernels for TPU, on heads that lie [width, tokens]: tokens fill the lanes, whatever a head's width.

A head of 40 numbers in 128 lanes would be moved as three; here it is moved as it is, and what is kept for the gradient beside
inputs and output is one number a token, log Σ exp of its scores. Scores stand as [keys, queries], and never leave the core
(Dao et al. 2022, arXiv 2205.14135). The gradient is one kernel, so that scores are computed again once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from e4t_jax.arrays import Array

_LANES = 128  # the width of a TPU's vector registers
_WIDEST = 256  # numbers a head; keys and values of a head are held in the core's memory whole
_WHOLE = 512  # tokens that are taken at once where they do not divide into parts of whole lanes
_MEMORY = 2**24  # bytes that a kernel has without asking

Heads = Float[Array, "batch heads width tokens"]
Others = Float[Array, "batch heads width others"]
Sums = Float[Array, "batch heads 1 tokens"]


def fits(tokens: int, others: int, width: int) -> bool:
    """Whether there is a kernel for so many queries and keys, of heads so wide."""
    return width <= _WIDEST and all(length <= _WHOLE or length % _LANES == 0 for length in (tokens, others))


def forward(query: Heads, key: Others, value: Others) -> tuple[Heads, Sums]:
    """softmax(Q Kᵀ / √width) V, and log Σ exp of every token's scores."""
    plan = _Plan(query, key)
    return pl.pallas_call(
        partial(_forward, plan.part, query.shape[2] ** -0.5),
        grid=plan.grid,
        in_specs=[plan.queries(), plan.keys(), plan.keys()],
        out_specs=[plan.queries(), plan.queries(1)],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype), plan.sums],
        compiler_params=plan.compiler,
        cost_estimate=plan.cost(2, [query, key, value, query, plan.sums]),
        name="attention_forward",
    )(query, key, value)


def backward(query: Heads, key: Others, value: Others, made: Heads, sums: Sums, change: Heads) -> tuple[Heads, Others, Others]:
    """Gradients of Q, K and V from that of what `forward` made."""
    plan = _Plan(query, key)
    return pl.pallas_call(
        partial(_backward, plan.part, query.shape[2] ** -0.5),
        grid=plan.grid,
        in_specs=[plan.queries(), plan.keys(), plan.keys(), plan.queries(), plan.queries(1), plan.queries()],
        out_specs=[plan.queries(), plan.keys(), plan.keys()],
        out_shape=[jax.ShapeDtypeStruct(one.shape, one.dtype) for one in (query, key, value)],
        scratch_shapes=[pltpu.VMEM(key.shape[2:], jnp.float32)] * 2,
        compiler_params=plan.compiler,
        cost_estimate=plan.cost(5, [query, key, value, query, key, value, made, sums, change]),
        name="attention_backward",
    )(query, key, value, made, sums, change)


class _Plan:
    """How a kernel goes over pictures, heads and parts of the queries, with all keys of a head at hand."""

    def __init__(self, query: Heads, key: Others) -> None:
        batch, heads, width, tokens = query.shape
        self.width, self.others = width, key.shape[3]
        self.step, self.part = _part(tokens), _part(self.others)
        self.grid = (batch, heads, tokens // self.step)
        self.sums = jax.ShapeDtypeStruct((batch, heads, 1, tokens), jnp.float32)
        # Two of every block, since the next is fetched meanwhile; sums of gradients; and some squares of scores.
        blocks = 2 * query.dtype.itemsize * width * 4 * (self.others + self.step) + 8 * width * self.others
        self.compiler = pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=max(_MEMORY, blocks + 8 * 4 * self.part * self.step),
        )

    def cost(self, products: int, moved: Sequence[Any]) -> pl.CostEstimate:
        """Every array is moved once: those of the keys stay while their head's queries pass."""
        scores = math.prod(self.sums.shape) * self.others
        moved_bytes = sum(one.size * one.dtype.itemsize for one in moved)
        return pl.CostEstimate(2 * products * self.width * scores, scores, moved_bytes)

    def queries(self, width: int | None = None) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, width or self.width, self.step), lambda i, j, k: (i, j, 0, k))

    def keys(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.width, self.others), lambda i, j, k: (i, j, 0, 0))


def _part(length: int) -> int:
    """How many tokens are taken at once."""
    return next((part for part in (512, 256, 128) if length % part == 0), length)


_TOP, _BOTH_TOP, _BOTH_LAST = (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ())), (((1,), (1,)), ((), ()))
_times = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def _each(part: int, length: int, body: Callable[[Any, Any], Any], first: Any) -> Any:
    """`body` over the parts of the keys, one after the other."""
    if part == length:
        return body(slice(None), first)
    return jax.lax.fori_loop(0, length // part, lambda i, held: body(pl.ds(pl.multiple_of(i * part, _LANES), part), held), first)


def _forward(part, scale, query_ref, key_ref, value_ref, made_ref, sums_ref):
    query = query_ref[...]
    width, tokens = query.shape

    def add(which, held):
        top, total, made = held
        scores = _times(key_ref[:, which], query, _BOTH_TOP) * scale  # [keys, queries]
        higher = jnp.maximum(top, scores.max(axis=0, keepdims=True))
        shares, fade = jnp.exp(scores - higher), jnp.exp(top - higher)
        value = value_ref[:, which]
        made = made * fade + _times(value, shares.astype(value.dtype), _TOP)
        return higher, total * fade + shares.sum(axis=0, keepdims=True), made

    begin = jnp.full((1, tokens), -jnp.inf), jnp.zeros((1, tokens)), jnp.zeros((width, tokens))
    top, total, made = _each(part, key_ref.shape[1], add, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), begin))
    made_ref[...] = (made / total).astype(made_ref.dtype)
    sums_ref[...] = top + jnp.log(total)


def _backward(
    part, scale, query_ref, key_ref, value_ref, made_ref, sums_ref, change_ref, by_query_ref, by_key_ref, by_value_ref, keys, values
):
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        keys[...], values[...] = jnp.zeros_like(keys), jnp.zeros_like(values)

    query, change, sums = query_ref[...], change_ref[...], sums_ref[...]
    mean = (made_ref[...].astype(jnp.float32) * change.astype(jnp.float32)).sum(axis=0, keepdims=True)

    def add(which, by_query):
        key = key_ref[:, which]
        shares = jnp.exp(_times(key, query, _BOTH_TOP) * scale - sums)
        values[:, which] += _times(change, shares.astype(change.dtype), _BOTH_LAST)
        by_scores = (shares * (_times(value_ref[:, which], change, _BOTH_TOP) - mean) * scale).astype(query.dtype)
        keys[:, which] += _times(query, by_scores, _BOTH_LAST)
        return by_query + _times(key, by_scores, _TOP)

    by_query = _each(part, key_ref.shape[1], add, jnp.zeros(query.shape, jnp.float32))
    by_query_ref[...] = by_query.astype(by_query_ref.dtype)

    @pl.when(step == steps - 1)
    def _():
        by_key_ref[...], by_value_ref[...] = keys[...].astype(by_key_ref.dtype), values[...].astype(by_value_ref.dtype)
