"""Stable Diffusion's autoencoder (Rombach et al. 2022, arXiv 2112.10752; Kingma & Welling 2014, arXiv 1312.6114)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from e4t_jax.bases.stable_diffusion.attention import attend, project
from e4t_jax.bases.stable_diffusion.layers import ACTIVATIONS, Conv, Downsample, GroupNorm, Map, ResidualBlock, Upsample
from e4t_jax.bases.stable_diffusion.policy import DEFAULT, Policy

# Keys of an autoencoder's configuration that have one value here; others change what is computed.
ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
# Keys that change nothing: where files came from, half precision's ways.
INERT = frozenset({"_diffusers_version", "_name_or_path", "_use_default_values", "force_upcast", "sample_size"})
_EPSILON = 1e-6


class VAE(nn.Module):
    """Pictures to the posterior of their latents, and back. Fields are the configuration's keys, with its defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # applied by who calls
    policy: Policy = DEFAULT

    @nn.nowrap
    def fault(self) -> str | None:
        """What the fields cannot be."""
        for key, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            kinds = getattr(self, key)
            if set(kinds) != {known} or len(kinds) != len(self.block_out_channels):
                return f"{key} = {list(kinds)} is not supported; only {known} for every one of block_out_channels is."
        for key in ("in_channels", "out_channels"):
            if getattr(self, key) != 3:
                return f"{key} = {getattr(self, key)} is not supported; pictures have 3."
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                return f"norm_num_groups = {self.norm_num_groups} do not divide {width} of block_out_channels."
        if self.act_fn not in ACTIVATIONS:
            return f"act_fn = {self.act_fn!r} is not supported; known are {', '.join(ACTIVATIONS)}."
        return None

    def setup(self) -> None:
        norm = {"groups": self.norm_num_groups, "epsilon": _EPSILON, "policy": self.policy}
        residual = partial(self.policy.block(ResidualBlock), activation=self.act_fn, **norm)
        common = (self.block_out_channels, residual, partial(GroupNorm, **norm), self.policy)
        self.encoder = Encoder(self.layers_per_block, 2 * self.latent_channels, *common)
        self.quant_conv = Conv(2 * self.latent_channels, size=1, policy=self.policy)
        self.post_quant_conv = Conv(self.latent_channels, size=1, policy=self.policy)
        self.decoder = Decoder(self.layers_per_block + 1, self.out_channels, *common)

    def encode(self, images: Map) -> tuple[Map, Map]:
        """Mean and log variance of the latents' normal posterior; the variance is kept between e^-30 and e^20."""
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(images)).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30, 20)

    def decode(self, latents: Map) -> Map:
        """Pictures of unscaled latents."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def __call__(self, images: Map) -> Map:
        """There and back, by the mean."""
        return self.decode(self.encode(images)[0])


class Encoder(nn.Module):
    """Residual blocks at every level, each level but the last followed by a halving; middle; to mean and log variance."""

    layers: int
    features: int
    widths: tuple[int, ...]
    residual: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    policy: Policy

    @nn.compact
    def __call__(self, x: Map) -> Map:
        x = Conv(self.widths[0], policy=self.policy, name="conv_in")(x)
        for level, width in enumerate(self.widths):
            halved = partial(self.policy.block(Downsample), width, padding=0, policy=self.policy, name="downsamplers_0")
            resized = halved if level < len(self.widths) - 1 else None
            x = Level(self.layers, partial(self.residual, width), resized, name=f"down_blocks_{level}")(x)
        x = MidBlock(partial(self.residual, self.widths[-1]), self.norm, self.policy, name="mid_block")(x)
        return self.policy.block(Conv)(self.features, policy=self.policy, name="conv_out")(
            nn.silu(self.norm(name="conv_norm_out")(x))
        )


class Decoder(nn.Module):
    """Middle; residual blocks at every level, each level but the last followed by a doubling; to a picture."""

    layers: int
    features: int
    widths: tuple[int, ...]
    residual: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    policy: Policy

    @nn.compact
    def __call__(self, x: Map) -> Map:
        widths = self.widths[::-1]
        x = self.policy.block(Conv)(widths[0], policy=self.policy, name="conv_in")(x)
        x = MidBlock(partial(self.residual, widths[0]), self.norm, self.policy, name="mid_block")(x)
        for level, width in enumerate(widths):
            doubled = partial(self.policy.block(Upsample), width, policy=self.policy, name="upsamplers_0")
            resized = doubled if level < len(widths) - 1 else None
            x = Level(self.layers, partial(self.residual, width), resized, name=f"up_blocks_{level}")(x)
        return self.policy.block(Conv)(self.features, policy=self.policy, name="conv_out")(
            nn.silu(self.norm(name="conv_norm_out")(x))
        )


class Level(nn.Module):
    """Residual blocks at one size, and a change of size."""

    layers: int
    residual: Callable[..., nn.Module]
    resized: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, x: Map) -> Map:
        for i in range(self.layers):
            x = self.residual(name=f"resnets_{i}")(x)
        return x if self.resized is None else self.resized()(x)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    residual: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    policy: Policy

    @nn.compact
    def __call__(self, x: Map) -> Map:
        x = self.residual(name="resnets_0")(x)
        x = self.policy.block(SelfAttention)(self.norm, self.policy, name="attentions_0")(x)
        return self.residual(name="resnets_1")(x)


class SelfAttention(nn.Module):
    """x + W attend(q, k, v) of norm(x), over the entries of the map, with one head."""

    norm: Callable[..., nn.Module]
    policy: Policy

    @nn.compact
    def __call__(self, x: Map) -> Map:
        batch, height, width, channels = x.shape
        normed = self.norm(name="group_norm")(x).reshape(batch, height * width, channels)
        query, key, value = project(normed, ("query", "key", "value"), 1, channels, use_bias=True, policy=self.policy)
        attended = attend(query, key, value, self.policy).reshape(normed.shape)
        return x + nn.Dense(channels, dtype=self.policy.dtype, name="proj_attn")(attended).reshape(x.shape)
