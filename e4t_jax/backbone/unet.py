"""The U-Net of Stable Diffusion with a window to its features: diffusers' class, subclassed, not copied."""

from __future__ import annotations

import jax.numpy as jnp
from diffusers.configuration_utils import flax_register_to_config
from diffusers.models.unets.unet_2d_blocks_flax import FlaxCrossAttnDownBlock2D, FlaxCrossAttnUpBlock2D
from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel
from flax import linen as nn
from jaxtyping import Array, Float, Int


@flax_register_to_config
class FeatureUNet(FlaxUNet2DConditionModel):
    """UNet2DCondition that also tells what its encoder half saw.

    φ_unet is every down-path residual and the mid-block's output, averaged over space and concatenated:
    F = 10,880 numbers for Stable Diffusion 1.x (Gal et al. 2023, arXiv 2302.12228).
    """

    def features(
        self, sample: Float[Array, "b h w c"], t: Int[Array, " b"], text: Float[Array, "b n d"]
    ) -> Float[Array, "b features"]:
        """φ_unet(z_t, t) under the given text states; the up path is not run."""
        _, middle, residuals = self._encode(sample, t, text)
        return _pool(middle, residuals)

    def denoise(
        self, sample: Float[Array, "b h w c"], t: Int[Array, " b"], text: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b features"]]:
        """The prediction (ε or v) and φ_unet of the same pass."""
        time, x, residuals = self._encode(sample, t, text)
        features = _pool(x, residuals)
        for block in self.up_blocks:
            count = self.layers_per_block + 1
            residuals, taken = residuals[:-count], residuals[-count:]
            if isinstance(block, FlaxCrossAttnUpBlock2D):
                x = block(x, temb=time, encoder_hidden_states=text, res_hidden_states_tuple=taken, deterministic=True)
            else:
                x = block(x, temb=time, res_hidden_states_tuple=taken, deterministic=True)
        return self.conv_out(nn.silu(self.conv_norm_out(x))), features

    def _encode(self, sample: Array, t: Array, text: Array) -> tuple[Array, Array, tuple[Array, ...]]:
        time = self.time_embedding(self.time_proj(t))
        x = self.conv_in(sample)
        residuals: tuple[Array, ...] = (x,)
        for block in self.down_blocks:
            inputs = (x, time, text) if isinstance(block, FlaxCrossAttnDownBlock2D) else (x, time)
            x, outputs = block(*inputs, deterministic=True)
            residuals += outputs
        return time, self.mid_block(x, time, text, deterministic=True), residuals


def _pool(middle: Array, residuals: tuple[Array, ...]) -> Float[Array, "b features"]:
    return jnp.concatenate([x.mean(axis=(1, 2)) for x in (*residuals, middle)], axis=-1)
