"""Stable Diffusion's U-Net (Rombach et al. 2022, arXiv 2112.10752), versions 1.x and 2.x, with a window to its features.

Down: residual blocks, each followed by a transformer over the map's entries that reads the text; every output is kept. Middle.
Up: the same, each residual block taking the next kept output beside its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from e4t_jax.arrays import Array
from e4t_jax.bases.stable_diffusion.attention import attend, project
from e4t_jax.bases.stable_diffusion.layers import (
    ACTIVATIONS,
    Conv,
    Dense,
    Downsample,
    GroupNorm,
    Map,
    ResidualBlock,
    Upsample,
    gelu,
)
from e4t_jax.bases.stable_diffusion.policy import DEFAULT, Policy

# Keys of a U-Net's configuration that have one value here, or several of one meaning; others change what is computed.
ONLY: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# Keys that change nothing: where files came from, training's dropout, half precision's ways, parts of what ONLY rules out.
INERT = frozenset(
    {
        "_diffusers_version",
        "_name_or_path",
        "_use_default_values",
        "addition_embed_type_num_heads",
        "decay",
        "dropout",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "split_head_dim",
        "upcast_attention",
        "update_after_step",
        "use_ema_warmup",
        "use_memory_efficient_attention",
    }
)
_TRANSFORMER_EPSILON = 1e-6  # of the group norm before a transformer, whatever `norm_eps` says
_KINDS = {"down": ("CrossAttnDownBlock2D", "DownBlock2D"), "up": ("CrossAttnUpBlock2D", "UpBlock2D")}

Text = Float[Array, "batch words text_width"]
Tokens = Float[Array, "batch _ _"]


class UNet(nn.Module):
    """ε or v, and φ_unet. Fields are the configuration's keys, with its defaults."""

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8  # by an old mistake of the format, the NUMBER of heads
    use_linear_projection: bool = False
    policy: Policy = DEFAULT

    @nn.nowrap
    def fault(self) -> str | None:
        """What the fields, each possible alone, cannot be together."""
        if self.in_channels != self.out_channels:
            return (
                f"in_channels = {self.in_channels} with out_channels = {self.out_channels} is a model that is given more than z_t "
                "(inpainting, upscaling, depth); only models of text alone are supported."
            )
        for direction, known in _KINDS.items():
            for kind in getattr(self, f"{direction}_block_types"):
                if kind not in known:
                    return f"{direction}_block_types holds {kind!r}; only {' and '.join(known)} are supported."
        levels = len(self.block_out_channels)
        for key in ("down_block_types", "up_block_types", "attention_head_dim", "transformer_layers_per_block"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != levels:
                return f"{key} = {list(value)} are not {levels}, one for each of block_out_channels; give as many."
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                return f"norm_num_groups = {self.norm_num_groups} do not divide {width} of block_out_channels."
        if self.act_fn not in ACTIVATIONS:
            return f"act_fn = {self.act_fn!r} is not supported; known are {', '.join(ACTIVATIONS)}."
        return None

    def setup(self) -> None:
        policy, widths = self.policy, self.block_out_channels
        last = len(widths) - 1
        norm: dict[str, Any] = {"groups": self.norm_num_groups, "policy": policy}
        residual = partial(policy.block(ResidualBlock), epsilon=self.norm_eps, activation=self.act_fn, **norm)
        transformers = [
            partial(policy.block(Transformer), heads=heads, depth=depth, linear=self.use_linear_projection, **norm)
            for heads, depth in zip(
                _each(self.attention_head_dim, widths), _each(self.transformer_layers_per_block, widths), strict=True
            )
        ]
        resized = partial(policy.block(Downsample), padding=self.downsample_padding, policy=policy)

        self.time_embedding = policy.block(TimeEmbedding)(4 * widths[0], self.act_fn, policy)
        self.conv_in = Conv(widths[0], policy=policy)
        self.down_blocks = [
            DownBlock(
                self.layers_per_block,
                partial(residual, widths[level]),
                transformers[level] if kind.startswith("CrossAttn") else None,
                partial(resized, widths[level]) if level < last else None,
            )
            for level, kind in enumerate(self.down_block_types)
        ]
        self.mid_block = MidBlock(partial(residual, widths[last], output_scale=self.mid_block_scale_factor), transformers[last])
        self.up_blocks = [
            UpBlock(
                self.layers_per_block + 1,
                partial(residual, widths[level]),
                transformers[level] if kind.startswith("CrossAttn") else None,
                partial(policy.block(Upsample), widths[level], policy=policy) if level > 0 else None,
            )
            for level, kind in zip(range(last, -1, -1), self.up_block_types, strict=True)
        ]
        self.conv_norm_out = GroupNorm(self.norm_num_groups, self.norm_eps, policy)
        self.conv_out = Conv(self.out_channels, policy=policy)

    def __call__(self, z_t: Map, t: Num[Array, " batch"], text: Text) -> tuple[Map, Float[Array, "batch features"]]:
        """The prediction (ε or v) and φ_unet of the same pass."""
        x, kept, time = self._encode(z_t, t, text)
        features = _pool([*kept, x])
        for block in self.up_blocks:
            x, kept = block(x, kept, time, text)
        x = self.conv_out(ACTIVATIONS[self.act_fn](self.conv_norm_out(x)))
        return x.astype(jnp.float32), features

    def features(self, z_t: Map, t: Num[Array, " batch"], text: Text) -> Float[Array, "batch features"]:
        """φ_unet alone; the up path is not run."""
        x, kept, _ = self._encode(z_t, t, text)
        return _pool([*kept, x])

    def _encode(self, z_t: Map, t: Array, text: Text) -> tuple[Map, list[Map], Array]:
        time = self.time_embedding(waves(t, self.block_out_channels[0], self.flip_sin_to_cos, self.freq_shift))
        x, text = self.conv_in(z_t), self.policy.cast(text)
        kept = [x]
        for block in self.down_blocks:
            x, outputs = block(x, time, text)
            kept += outputs
        return self.mid_block(x, time, text), kept, time


def _each(value: int | tuple[int, ...], levels: tuple[int, ...]) -> tuple[int, ...]:
    return (value,) * len(levels) if isinstance(value, int) else value


def _pool(maps: list[Map]) -> Float[Array, "batch features"]:
    """φ_unet (Gal et al. 2023, arXiv 2302.12228): every kept output and the middle's, averaged over space; F = 10,880 for SD."""
    return jnp.concatenate([x.mean(axis=(1, 2), dtype=jnp.float32) for x in maps], axis=-1)


def waves(t: Num[Array, " batch"], width: int, cosine_first: bool, shift: float) -> Float[Array, "batch width"]:
    """sin and cos of t · 10000^(-i / (width/2 - shift)), i = 0 … width/2 - 1."""
    # Of NumPy's, and so constants: the compiler then sees that two passes at the same timesteps begin alike, and runs that once.
    rates = np.exp(-math.log(10_000) * np.arange(width // 2) / (width // 2 - shift)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * rates
    parts = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate(parts[::-1] if cosine_first else parts, axis=-1)


class TimeEmbedding(nn.Module):
    """W₂ act(W₁ waves(t))."""

    width: int
    activation: str
    policy: Policy

    @nn.compact
    def __call__(self, x: Float[Array, "batch waves"]) -> Float[Array, "batch width"]:
        linear = partial(Dense, self.width, dtype=self.policy.dtype)
        return linear(name="linear_2")(ACTIVATIONS[self.activation](linear(name="linear_1")(x)))


class DownBlock(nn.Module):
    """One level on the way down; also returns every output, for φ_unet and the way up."""

    layers: int
    residual: Callable[..., nn.Module]
    transformer: Callable[..., nn.Module] | None
    resized: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, x: Map, time: Array, text: Text) -> tuple[Map, list[Map]]:
        outputs = []
        for i in range(self.layers):
            x = self.residual(name=f"resnets_{i}")(x, time)
            if self.transformer is not None:
                x = self.transformer(name=f"attentions_{i}")(x, text)
            outputs.append(x)
        if self.resized is not None:
            x = self.resized(name="downsamplers_0")(x)
            outputs.append(x)
        return x, outputs


class MidBlock(nn.Module):
    """Residual block, transformer, residual block."""

    residual: Callable[..., nn.Module]
    transformer: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Map, time: Array, text: Text) -> Map:
        x = self.residual(name="resnets_0")(x, time)
        x = self.transformer(name="attentions_0")(x, text)
        return self.residual(name="resnets_1")(x, time)


class UpBlock(nn.Module):
    """One level on the way up; takes the last of the kept outputs, one for every layer, and returns the rest."""

    layers: int
    residual: Callable[..., nn.Module]
    transformer: Callable[..., nn.Module] | None
    resized: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, x: Map, kept: list[Map], time: Array, text: Text) -> tuple[Map, list[Map]]:
        kept = list(kept)
        for i in range(self.layers):
            x = self.residual(name=f"resnets_{i}")(jnp.concatenate([x, kept.pop()], axis=-1), time)
            if self.transformer is not None:
                x = self.transformer(name=f"attentions_{i}")(x, text)
        if self.resized is not None:
            x = self.resized(name="upsamplers_0")(x)
        return x, kept


class Transformer(nn.Module):
    """x + W_out blocks(W_in norm(x)), over the entries of the map."""

    heads: int
    depth: int
    groups: int
    linear: bool
    policy: Policy

    @nn.compact
    def __call__(self, x: Map, text: Text) -> Map:
        batch, height, width, channels = x.shape
        # The two kinds of projection compute the same; only their weights' shapes differ.
        projection = partial(Dense, dtype=self.policy.dtype) if self.linear else partial(Conv, size=1, policy=self.policy)
        inner = channels // self.heads * self.heads
        h = projection(inner, name="proj_in")(GroupNorm(self.groups, _TRANSFORMER_EPSILON, self.policy, name="norm")(x))
        h = h.reshape(batch, height * width, inner)
        for i in range(self.depth):
            h = TransformerBlock(self.heads, self.policy, name=f"transformer_blocks_{i}")(h, text)
        return x + projection(channels, name="proj_out")(h.reshape(batch, height, width, inner))


class TransformerBlock(nn.Module):
    """Attention to itself, attention to the text, a gated network; each added to its input, after a layer norm of it."""

    heads: int
    policy: Policy

    @nn.compact
    def __call__(self, x: Tokens, text: Text) -> Tokens:
        norm = partial(nn.LayerNorm, epsilon=1e-5, dtype=self.policy.dtype)
        x += Attention(self.heads, self.policy, name="attn1")(norm(name="norm1")(x))
        x += Attention(self.heads, self.policy, name="attn2")(norm(name="norm2")(x), text)
        return x + FeedForward(self.policy, name="ff")(norm(name="norm3")(x))


class Attention(nn.Module):
    """W_out attend(x W_q, source W_k, source W_v); the source is x itself where no other is given."""

    heads: int
    policy: Policy

    @nn.compact
    def __call__(self, x: Tokens, source: Text | None = None) -> Tokens:
        width = x.shape[-1]
        split = partial(project, heads=self.heads, width=width // self.heads, use_bias=False, policy=self.policy)
        if source is None:
            query, key, value = split(x, ("to_q", "to_k", "to_v"))
        else:
            (query,) = split(x, ("to_q",))
            key, value = split(source, ("to_k", "to_v"))
        attended = attend(query, key, value, self.policy).reshape(x.shape)
        return Dense(width, dtype=self.policy.dtype, name="to_out_0")(attended)


class FeedForward(nn.Module):
    """W (h ⊙ GELU(g)), (h, g) the halves of a projection to eight times the width (Shazeer 2020, arXiv 2002.05202); exact GELU."""

    policy: Policy

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        gated = Gate(4 * x.shape[-1], self.policy, name="net_0")(x)
        return Dense(x.shape[-1], dtype=self.policy.dtype, name="net_2")(gated)


class Gate(nn.Module):
    """h ⊙ GELU(g)."""

    width: int
    policy: Policy

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        hidden, gate = jnp.split(Dense(2 * self.width, dtype=self.policy.dtype, name="proj")(x), 2, axis=-1)
        return hidden * gelu(gate)
