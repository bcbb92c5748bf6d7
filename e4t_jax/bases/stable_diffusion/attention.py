"""Attention, softmax(Q Kᵀ / √d) V (Vaswani et al. 2017, arXiv 1706.03762), by the kernel of the platform it is lowered for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.bases.stable_diffusion.layers import product
from e4t_jax.bases.stable_diffusion.policy import Policy

# From this many tokens on, the matrix of scores is worth avoiding: as many as a feature map of 16×16 has.
_LONG = 256
_LONG_CUDNN = 1024
_LANES = 128  # the width of a TPU's vector registers
_CUDNN_WIDEST_HEAD = 128

Heads = Float[Array, "batch _ heads width"]
Sums = Float[Array, "batch heads 1 tokens"]


def attend(
    query: Float[Array, "batch tokens heads width"],
    key: Float[Array, "batch others heads width"],
    value: Float[Array, "batch others heads width"],
    policy: Policy,
    causal: bool = False,
) -> Float[Array, "batch tokens heads width"]:
    """softmax(Q Kᵀ / √width) V, softmax in float32; causal: a token sees itself and what is before it.

    Of many tokens it runs on a kernel that keeps no scores where the platform has one (Dao et al. 2022, arXiv 2205.14135): our own
    on TPU (`tpu_attention`), cuDNN's for long self-attention on NVIDIA in half precision. A program for several TPUs that is
    compiled by `jit` alone is to be traced under `jax.set_mesh`, or with the plain form ("xla").
    """
    if policy.attention == "xla" or query.shape[1] < _LONG or causal:
        return _plain(query, key, value, causal)
    return _attend_long(query, key, value)


def _plain(query: Heads, key: Heads, value: Heads, causal: bool = False) -> Heads:
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    if causal:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(value.dtype), value)


Kept = tuple[Heads, Heads, Heads, Heads, Sums]


@jax.custom_vjp
def _attend_long(query: Heads, key: Heads, value: Heads) -> Heads:
    return _attend_forward(query, key, value)[0]


def _attend_forward(query: Heads, key: Heads, value: Heads) -> tuple[Heads, Kept]:
    def alone(kernel: Callable[..., Heads]) -> Callable[..., tuple[Heads, Sums]]:
        return lambda query, key, value: (kernel(query, key, value), _no_sums(query))

    # Chosen at lowering, not by asking for the default backend: what is traced here may run elsewhere.
    made, sums = jax.lax.platform_dependent(query, key, value, tpu=_on_tpu, cuda=alone(_cudnn), default=alone(_plain))
    return made, (query, key, value, made, sums)


def _attend_backward(kept: Kept, change: Heads) -> tuple[Heads, Heads, Heads]:
    def gradient(kernel: Callable[..., Heads]) -> Callable[..., tuple[Heads, Heads, Heads]]:
        return lambda query, key, value, made, sums, change: jax.vjp(kernel, query, key, value)[1](change)

    return jax.lax.platform_dependent(*kept, change, tpu=_gradient_on_tpu, cuda=gradient(_cudnn), default=gradient(_plain))


_attend_long.defvjp(_attend_forward, _attend_backward)


def _no_sums(query: Heads) -> Sums:
    batch, tokens, heads, _ = query.shape
    return jnp.zeros((batch, heads, 1, tokens), jnp.float32)


def _on_tpu(query: Heads, key: Heads, value: Heads) -> tuple[Heads, Sums]:
    from e4t_jax.bases.stable_diffusion import tpu_attention

    if not tpu_attention.fits(query.shape[1], key.shape[1], query.shape[3]):
        return _in_blocks(query, key, value), _no_sums(query)
    made, sums = _of_each_device(tpu_attention.forward)(*(_tokens_last(heads) for heads in (query, key, value)))
    return _tokens_second(made), sums


def _gradient_on_tpu(query: Heads, key: Heads, value: Heads, made: Heads, sums: Sums, change: Heads) -> tuple[Heads, Heads, Heads]:
    from e4t_jax.bases.stable_diffusion import tpu_attention

    if not tpu_attention.fits(query.shape[1], key.shape[1], query.shape[3]):
        return jax.vjp(_in_blocks, query, key, value)[1](change)
    query, key, value, made, change = (_tokens_last(heads) for heads in (query, key, value, made, change))
    by_query, by_key, by_value = _of_each_device(tpu_attention.backward)(query, key, value, made, sums, change)
    return _tokens_second(by_query), _tokens_second(by_key), _tokens_second(by_value)


def _tokens_last(heads: Heads) -> Float[Array, "batch heads width tokens"]:
    return heads.transpose(0, 2, 3, 1)


def _tokens_second(heads: Float[Array, "batch heads width tokens"]) -> Heads:
    return heads.transpose(0, 3, 1, 2)


def _of_each_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A Pallas kernel, which XLA cannot split by itself: over the mesh that the caller has set, every device takes its share."""

    def run(*heads: Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        axes = tuple(name for name, kind in kinds if kind == jax.sharding.AxisType.Auto)
        if not axes or heads[0].shape[0] % math.prod(mesh.shape[name] for name in axes):
            return kernel(*heads)
        return jax.shard_map(kernel, in_specs=jax.P(axes), out_specs=jax.P(axes), check_vma=False)(*heads)

    return run


def _in_blocks(query: Heads, key: Heads, value: Heads) -> Heads:
    """JAX's own flash kernel, for heads too wide for ours: the autoencoder's one."""
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    tokens, width = query.shape[1], query.shape[3]
    if tokens % _LANES or tokens != key.shape[1]:
        return _plain(query, key, value)
    block = next(size for size in (512, 256, 128) if tokens % size == 0)
    names = ("q_major_dkv", "k_major_dkv", "k_dkv", "q_dkv", "k_major_dq", "k_dq", "q_dq")
    blocks = BlockSizes(block, block, block, 1, **{f"block_{name}": block for name in names})
    # Heads as wide as whole registers; zeros add nothing to a score.
    fill = ((0, 0), (0, 0), (0, 0), (0, -width % _LANES))
    padded = [jnp.pad(x, fill).transpose(0, 2, 1, 3) for x in (query, key, value)]
    attended = _of_each_device(partial(flash_attention, sm_scale=width**-0.5, block_sizes=blocks))(*padded)
    return attended.transpose(0, 2, 1, 3)[..., :width]


def _cudnn(query: Heads, key: Heads, value: Heads) -> Heads:
    long = min(query.shape[1], key.shape[1]) >= _LONG_CUDNN and query.shape[1] == key.shape[1]
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if not long or not half or query.shape[3] > _CUDNN_WIDEST_HEAD or query.shape[3] % 8:
        return _plain(query, key, value)
    try:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    except RuntimeError:  # an installation without cuDNN, which traces this branch and will not lower it
        return _plain(query, key, value)


class _Weights(nn.Module):
    """The weights of a linear layer, for callers that multiply by several at once."""

    shape: tuple[int, int]
    use_bias: bool

    @nn.compact
    def __call__(self) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, self.shape[1:]) if self.use_bias else None


def project(
    x: Float[Array, "batch tokens features"], names: Sequence[str], heads: int, width: int, use_bias: bool, policy: Policy
) -> list[Heads]:
    """x W (+ b) for the layers of the calling module that `names` names, split into heads: one matrix product for all.

    To be called in a compact method, like a layer.
    """
    weights = [_Weights((x.shape[-1], heads * width), use_bias, name=name)() for name in names]
    made = product(policy.cast(x), policy.cast(jnp.concatenate([kernel for kernel, _ in weights], axis=1)))
    if use_bias:
        made += policy.cast(jnp.concatenate([bias for _, bias in weights]))
    return [part.reshape(*x.shape[:-1], heads, width) for part in jnp.split(made, len(names), axis=-1)]
