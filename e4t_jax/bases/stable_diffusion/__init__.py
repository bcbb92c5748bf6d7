"""Stable Diffusion's networks as Flax modules: U-Net, autoencoder, and CLIP's two towers.

Written from the architecture's facts, to be read beside the papers. Names, nesting and shapes of the weights are those of the
checkpoints ("down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel" is PyTorch's
"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"), so that a file is read by walking the tree.
"""

from e4t_jax.bases.stable_diffusion.clip import CLIPText, CLIPVision
from e4t_jax.bases.stable_diffusion.policy import DEFAULT as DEFAULT_POLICY
from e4t_jax.bases.stable_diffusion.policy import Policy
from e4t_jax.bases.stable_diffusion.settings import check_config, module_of
from e4t_jax.bases.stable_diffusion.unet import UNet
from e4t_jax.bases.stable_diffusion.vae import VAE

__all__ = ["DEFAULT_POLICY", "VAE", "CLIPText", "CLIPVision", "Policy", "UNet", "check_config", "module_of"]
