"""What U-Net and autoencoder are made of: convolution, group norm, residual block, resizing. Maps are NHWC throughout."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.bases.stable_diffusion.policy import DEFAULT, Policy

Map = Float[Array, "batch _ _ _"]  # NHWC; height, width and channels change from layer to layer


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Φ(x), exact (Hendrycks & Gimpel 2016, arXiv 1606.08415).

    By erf, for which a CPU takes half as long as for `nn.gelu`'s erfc; in float32, since 1 + erf cancels.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "gelu": gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
    "relu": nn.relu,
}


@jax.custom_vjp
def product(x: Float[Array, "*rows inner"], kernel: Float[Array, "inner outer"]) -> Float[Array, "*rows outer"]:
    """x W, with the gradient of W as a product of the two as they lie.

    Differentiated by the rules of `@`, it is one of two transposed matrices, and takes a CPU two to four times as long.
    """
    return x @ kernel


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _product_backward(kept: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    x, kernel = kept
    rows = tuple(range(x.ndim - 1))
    by_x = jax.lax.dot_general(change, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    return by_x, jax.lax.dot_general(x, change, ((rows, rows), ((), ())))


product.defvjp(_product_forward, _product_backward)


def _dot_general(x: Array, kernel: Array, dimensions: Any, precision: None = None) -> Array:
    return product(x, kernel)  # the only dimensions that `nn.Dense` asks for


Dense = partial(nn.Dense, dot_general=_dot_general)  # x W + b


# On CPUs, XLA's gradient of a convolution is slow inside a `scan` (5 to 30 times, on 8×8 maps), so that of maps as small and deep
# as these is taken by matrix products; the convolution itself is the faster one, but for the very smallest maps.
_SMALL_MAP = 16
_TINY_MAP = 4
_DEEP = 48


class Conv(nn.Module):
    """A convolution with a square kernel; `padding` before and after, the same on both axes."""

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    policy: Policy = DEFAULT

    @nn.compact
    def __call__(self, x: Map) -> Map:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.policy.cast(self.param("kernel", nn.initializers.lecun_normal(), shape))
        bias = self.policy.cast(self.param("bias", nn.initializers.zeros, (self.features,)))
        x = self.policy.cast(x)
        if self.size == 1:
            return product(x, kernel[0, 0]) + bias
        small = self.size == 3 and max(x.shape[1:3]) <= _SMALL_MAP and x.shape[3] >= _DEEP
        return (_convolve_small if small else _convolve)(x, kernel, self.stride, self.padding) + bias


def _convolve(x: Map, kernel: Float[Array, "h w channels features"], stride: int, padding: tuple[int, int]) -> Map:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolve_by_product(x: Map, kernel: Float[Array, "h w channels features"], stride: int, padding: tuple[int, int]) -> Map:
    """The same as one matrix product over the nine shifted inputs."""
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    height, width = ((size - 3) // stride + 1 for size in x.shape[1:3])
    shifted = [
        x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
        for i in range(3)
        for j in range(3)
    ]
    return product(jnp.concatenate(shifted, axis=-1), kernel.reshape(-1, kernel.shape[-1]))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_small(x: Map, kernel: Float[Array, "h w channels features"], stride: int, padding: tuple[int, int]) -> Map:
    plain = partial(_convolve, stride=stride, padding=padding)
    if max(x.shape[1:3]) > _TINY_MAP:
        return plain(x, kernel)
    product = partial(_convolve_by_product, stride=stride, padding=padding)
    return jax.lax.platform_dependent(x, kernel, cpu=product, default=plain)


def _convolve_small_forward(x: Map, kernel: Array, stride: int, padding: tuple[int, int]) -> tuple[Map, tuple[Map, Array]]:
    return _convolve_small(x, kernel, stride, padding), (x, kernel)


def _convolve_small_backward(stride: int, padding: tuple[int, int], kept: tuple[Map, Array], change: Map) -> tuple[Map, Array]:
    def gradient(form: Callable[..., Map]) -> Callable[..., tuple[Map, Array]]:
        form = partial(form, stride=stride, padding=padding)
        return lambda x, kernel, change: jax.vjp(form, x, kernel)[1](change)

    return jax.lax.platform_dependent(*kept, change, cpu=gradient(_convolve_by_product), default=gradient(_convolve))


_convolve_small.defvjp(_convolve_small_forward, _convolve_small_backward)


class GroupNorm(nn.Module):
    """(x - mean) / √(variance + ε) · scale + bias over space and the channels of a group (Wu & He 2018, arXiv 1803.08494).

    One pass: Σx and Σx² of every channel, from which the groups' statistics follow, and then y = a x + b with a and b of
    every picture and channel. From channels to groups and back it goes by products with the matrix of who is a member of what:
    an entry of the map then meets a number of its own channel, not of a group, which is a fiftieth of a tuning step on a CPU.
    """

    groups: int
    epsilon: float
    policy: Policy = DEFAULT

    @nn.compact
    def __call__(self, x: Map) -> Map:
        _, height, width, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = x.astype(jnp.float32)

        each = channels // self.groups
        member = (jnp.arange(channels)[:, None] // each == jnp.arange(self.groups)).astype(jnp.float32)
        exact = partial(jnp.matmul, precision="highest")
        sums = jnp.stack([x.sum(axis=(1, 2)), jnp.square(x).sum(axis=(1, 2))])
        mean, mean_square = exact(sums, member) / (height * width * each)
        inverse = jax.lax.rsqrt(jnp.maximum(mean_square - jnp.square(mean), 0) + self.epsilon)
        inverse, shift = exact(jnp.stack([inverse, mean * inverse]), member.T)
        a, b = scale * inverse, bias - scale * shift
        return self.policy.cast(x * a[:, None, None] + b[:, None, None])


class ResidualBlock(nn.Module):
    """(x + conv(act(norm(conv(act(norm(x))) + W act(time))))) / output_scale; x by a 1×1 convolution where widths differ."""

    features: int
    groups: int
    epsilon: float
    activation: str = "silu"
    output_scale: float = 1.0
    policy: Policy = DEFAULT

    @nn.compact
    def __call__(self, x: Map, time: Float[Array, "batch width"] | None = None) -> Map:
        act, policy = ACTIVATIONS[self.activation], self.policy
        norm = partial(GroupNorm, self.groups, self.epsilon, policy)
        h = Conv(self.features, policy=policy, name="conv1")(act(norm(name="norm1")(x)))
        if time is not None:
            h += Dense(self.features, dtype=policy.dtype, name="time_emb_proj")(act(time))[:, None, None]
        h = Conv(self.features, policy=policy, name="conv2")(act(norm(name="norm2")(h)))
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, policy=policy, name="conv_shortcut")(x)
        x += h
        return x if self.output_scale == 1 else x / self.output_scale


class Downsample(nn.Module):
    """Half the size, by a convolution of stride 2; without `padding`, one row and column are added at the far ends."""

    features: int
    padding: int = 1
    policy: Policy = DEFAULT

    @nn.compact
    def __call__(self, x: Map) -> Map:
        padding = (self.padding, self.padding) if self.padding else (0, 1)
        return Conv(self.features, stride=2, padding=padding, policy=self.policy, name="conv")(x)


class Upsample(nn.Module):
    """Twice the size, every entry four times, and a convolution."""

    features: int
    policy: Policy = DEFAULT

    @nn.compact
    def __call__(self, x: Map) -> Map:
        batch, height, width, channels = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        x = x.reshape(batch, 2 * height, 2 * width, channels)
        return Conv(self.features, policy=self.policy, name="conv")(x)
