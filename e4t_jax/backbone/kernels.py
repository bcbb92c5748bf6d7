"""Other kernels for the backbone's layers, put in from outside: the modules themselves know nothing of them.

Two are exact where diffusers' Flax classes are not, so that weights compute what they compute in PyTorch:

* GEGLU uses the exact GELU, not its tanh approximation.
* The group norm before a transformer uses ε = 1e-6, not 1e-5.

Two are faster:

* Attention runs through `jax.nn.dot_product_attention`, which picks a fused kernel where the device has one.
* On CPUs, a small 3×3 convolution becomes one matrix product over its nine shifted inputs: XLA's own gradient of a
  convolution is about half as fast there on maps of up to 16×16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from diffusers.models.attention_flax import FlaxAttention, FlaxGEGLU, FlaxTransformer2DModel
from jaxtyping import Array, Float

_LARGEST_MAP = 16
_FEWEST_CHANNELS = 48
_TRANSFORMER_EPSILON = 1e-6


def kernels(next_call: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
    """A `flax.linen.intercept_methods` interceptor."""
    module = context.module
    if context.method_name != "__call__" or module.is_initializing():
        return next_call(*args, **kwargs)
    if isinstance(module, FlaxAttention):
        return _attention(module, *args, **kwargs)
    if isinstance(module, FlaxGEGLU):
        linear, gate = jnp.split(module.proj(args[0]), 2, axis=-1)
        return linear * jax.nn.gelu(gate, approximate=False)
    if isinstance(module, nn.GroupNorm) and isinstance(module.parent, FlaxTransformer2DModel):
        return _group_norm(module, args[0])
    if isinstance(module, nn.Conv) and jax.default_backend() == "cpu" and _is_small(module, args[0]):
        return _convolve(module, args[0])
    return next_call(*args, **kwargs)


def _attention(module: FlaxAttention, hidden_states: Array, context: Array | None = None, deterministic: bool = True):
    del deterministic  # dropout is never on: the backbone is used as it was trained
    source = hidden_states if context is None else context
    query, key, value = (
        project(states).reshape(*states.shape[:2], module.heads, module.dim_head)
        for project, states in ((module.query, hidden_states), (module.key, source), (module.value, source))
    )
    attended = jax.nn.dot_product_attention(query, key, value)
    return module.proj_attn(attended.reshape(*hidden_states.shape[:2], -1))


def _group_norm(module: nn.GroupNorm, x: Float[Array, "batch height width channels"]) -> Array:
    groups = x.reshape(x.shape[0], -1, module.num_groups, x.shape[-1] // module.num_groups)
    mean = groups.mean(axis=(1, 3), keepdims=True)
    variance = groups.var(axis=(1, 3), keepdims=True)
    normed = ((groups - mean) * jax.lax.rsqrt(variance + _TRANSFORMER_EPSILON)).reshape(x.shape)
    return normed * module.get_variable("params", "scale") + module.get_variable("params", "bias")


def _is_small(module: nn.Conv, x: Array) -> bool:
    return (
        tuple(module.kernel_size) == (3, 3)
        and x.ndim == 4
        and max(x.shape[1:3]) <= _LARGEST_MAP
        and x.shape[3] >= _FEWEST_CHANNELS
        and module.feature_group_count == 1
        and not isinstance(module.padding, (str, int))
    )


def _convolve(module: nn.Conv, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w features"]:
    kernel, bias = module.get_variable("params", "kernel"), module.get_variable("params", "bias")
    strides = module.strides if isinstance(module.strides, tuple) else (module.strides or 1,) * 2
    x = jnp.pad(x, ((0, 0), *module.padding, (0, 0)))
    height, width = ((size - 3) // stride + 1 for size, stride in zip(x.shape[1:3], strides, strict=True))
    shifted = [
        x[:, i : i + (height - 1) * strides[0] + 1 : strides[0], j : j + (width - 1) * strides[1] + 1 : strides[1]]
        for i in range(3)
        for j in range(3)
    ]
    columns = jnp.concatenate(shifted, axis=-1)
    return columns @ kernel.reshape(-1, kernel.shape[-1]) + bias
