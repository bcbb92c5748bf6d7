"""Stable Diffusion in Flax: the one place that imports the Flax classes of diffusers and transformers."""

from diffusers.utils import logging

# One deprecation line for every layer is no news to a user; said before the classes below are imported.
logging.set_verbosity_error()

from e4t_jax.backbone.base import (  # noqa: E402
    Base,
    Params,
    attention_kernels,
    attention_weights,
    decode_latents,
    denoise,
    denoise_with_features,
    embed_image,
    embed_text,
    encode_images,
    encode_text,
    feature_count,
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
from e4t_jax.backbone.files import fill_part, load_base, load_part, save_base, save_part, torch_name, write_json  # noqa: E402
from e4t_jax.backbone.geometries import TEXT_LENGTH, VOCABULARY, geometry  # noqa: E402
from e4t_jax.backbone.hub import IMAGE_ENCODER_FILES, find_folder  # noqa: E402
from e4t_jax.backbone.weights import Weights, load_pickled, read_json  # noqa: E402

__all__ = [
    "IMAGE_ENCODER_FILES",
    "TEXT_LENGTH",
    "VOCABULARY",
    "Base",
    "Params",
    "Weights",
    "attention_kernels",
    "attention_weights",
    "decode_latents",
    "denoise",
    "denoise_with_features",
    "embed_image",
    "embed_text",
    "encode_images",
    "encode_text",
    "feature_count",
    "feature_width",
    "fill_part",
    "find_folder",
    "geometry",
    "has_projection",
    "image_features",
    "latent_distribution",
    "load_base",
    "load_part",
    "load_pickled",
    "look_up_words",
    "param_shapes",
    "random_params",
    "read_json",
    "save_base",
    "save_part",
    "torch_name",
    "unet_features",
    "with_scaling_factor",
    "write_json",
]
