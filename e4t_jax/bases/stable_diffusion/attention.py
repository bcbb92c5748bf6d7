"""Attention, softmax(Q Kᵀ / √d) V (Vaswani et al. 2017, arXiv 1706.03762), by the kernel of the platform it is lowered for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.bases.stable_diffusion.layers import product
from e4t_jax.bases.stable_diffusion.policy import Policy

# From this many tokens on, the matrix of scores is worth avoiding. A feature map of 32×32 has as many.
_LONG = 1024
_LANES = 128  # the width of a TPU's vector registers
_CUDNN_WIDEST_HEAD = 128

Heads = Float[Array, "batch _ heads width"]


def attend(
    query: Float[Array, "batch tokens heads width"],
    key: Float[Array, "batch others heads width"],
    value: Float[Array, "batch others heads width"],
    policy: Policy,
    causal: bool = False,
) -> Float[Array, "batch tokens heads width"]:
    """softmax(Q Kᵀ / √width) V, softmax in float32; causal: a token sees itself and what is before it.

    Long self-attention runs on a flash kernel where the platform has one (Dao et al. 2022, arXiv 2205.14135): Pallas' on TPU,
    cuDNN's on NVIDIA in half precision. Its gradient runs it again rather than keep the scores. A program for several TPUs that is
    compiled by `jit` alone is to be traced under `jax.set_mesh`, or with the plain form ("xla").
    """
    long = min(query.shape[1], key.shape[1]) >= _LONG and query.shape[1] == key.shape[1] and not causal
    if policy.attention == "xla" or not long:
        return _plain(query, key, value, causal)
    return _attend_long(query, key, value)


def _plain(query: Heads, key: Heads, value: Heads, causal: bool = False) -> Heads:
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    if causal:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(value.dtype), value)


@jax.custom_vjp
def _attend_long(query: Heads, key: Heads, value: Heads) -> Heads:
    # Chosen at lowering, not by asking for the default backend: what is traced here may run elsewhere.
    return jax.lax.platform_dependent(query, key, value, tpu=_flash, cuda=_cudnn, default=_plain)


def _attend_forward(query: Heads, key: Heads, value: Heads) -> tuple[Heads, tuple[Heads, Heads, Heads]]:
    return _attend_long(query, key, value), (query, key, value)


def _attend_backward(kept: tuple[Heads, Heads, Heads], change: Heads) -> tuple[Heads, Heads, Heads]:
    def gradient(kernel):
        return lambda query, key, value, change: jax.vjp(kernel, query, key, value)[1](change)

    return jax.lax.platform_dependent(*kept, change, tpu=gradient(_flash), cuda=gradient(_cudnn), default=gradient(_plain))


_attend_long.defvjp(_attend_forward, _attend_backward)


def _flash(query: Heads, key: Heads, value: Heads) -> Heads:
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    tokens, width = query.shape[1], query.shape[3]
    if tokens % _LANES:
        return _plain(query, key, value)
    block = next(size for size in (512, 256, 128) if tokens % size == 0)
    names = ("q_major_dkv", "k_major_dkv", "k_dkv", "q_dkv", "k_major_dq", "k_dq", "q_dq")
    blocks = BlockSizes(block, block, block, 1, **{f"block_{name}": block for name in names})
    # Heads as wide as whole registers; zeros add nothing to a score.
    fill = ((0, 0), (0, 0), (0, 0), (0, -width % _LANES))
    padded = [jnp.pad(x, fill).transpose(0, 2, 1, 3) for x in (query, key, value)]
    kernel = partial(flash_attention, sm_scale=width**-0.5, block_sizes=blocks)
    # XLA cannot split a Pallas kernel by itself: over the mesh that the caller has set, every device takes its share of the batch.
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == jax.sharding.AxisType.Auto)
    if axes and not query.shape[0] % math.prod(mesh.shape[name] for name in axes):
        kernel = jax.shard_map(kernel, in_specs=jax.P(axes), out_specs=jax.P(axes), check_vma=False)
    attended = kernel(*padded)
    return attended.transpose(0, 2, 1, 3)[..., :width]


def _cudnn(query: Heads, key: Heads, value: Heads) -> Heads:
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if not half or query.shape[3] > _CUDNN_WIDEST_HEAD or query.shape[3] % 8:
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
