"""Stable Diffusion in Flax: the one place that imports the Flax classes of diffusers and transformers."""

from diffusers.utils import logging

# One deprecation line for every layer is no news to a user; said before the classes below are imported.
logging.set_verbosity_error()

from e4t_jax.backbone.base import (  # noqa: E402
    Base,
    Params,
    attention_kernels,
    decode_latents,
    denoise,
    denoise_with_features,
    embed_image,
    embed_text,
    encode_images,
    encode_text,
    feature_width,
    has_projection,
    image_features,
    latent_distribution,
    look_up_words,
    param_shapes,
    random_params,
    unet_features,
    with_scaling_factor,
)
from e4t_jax.backbone.files import load_base, load_part, save_base, save_part, torch_name  # noqa: E402

__all__ = [
    "Base",
    "Params",
    "attention_kernels",
    "decode_latents",
    "denoise",
    "denoise_with_features",
    "embed_image",
    "embed_text",
    "encode_images",
    "encode_text",
    "feature_width",
    "has_projection",
    "image_features",
    "latent_distribution",
    "load_base",
    "load_part",
    "look_up_words",
    "param_shapes",
    "random_params",
    "save_base",
    "save_part",
    "torch_name",
    "unet_features",
    "with_scaling_factor",
]
