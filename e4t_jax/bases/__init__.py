"""Text-to-image models: what the method asks of one (`protocol`), where it is found (`load`), and Stable Diffusion's."""

from e4t_jax.bases.formats import Weights, load_pickled, open_weights, read_json
from e4t_jax.bases.hub import IMAGE_ENCODER, find_folder
from e4t_jax.bases.load import (
    base_folder,
    image_encoder_folder,
    load_base,
    load_base_shapes,
    local_folder,
    open_base,
    survey_base,
)
from e4t_jax.bases.protocol import Base, ImageEncoder, LoadedBase, Params
from e4t_jax.bases.stable_diffusion.base import StableDiffusion
from e4t_jax.bases.stable_diffusion.folder import fill_part, load_folder, load_part, save_folder, save_part, write_json
from e4t_jax.bases.stable_diffusion.geometries import TEXT_LENGTH, VOCABULARY, geometry
from e4t_jax.bases.stable_diffusion.names import torch_name

__all__ = [
    "IMAGE_ENCODER",
    "TEXT_LENGTH",
    "VOCABULARY",
    "Base",
    "ImageEncoder",
    "LoadedBase",
    "Params",
    "StableDiffusion",
    "Weights",
    "base_folder",
    "fill_part",
    "find_folder",
    "geometry",
    "image_encoder_folder",
    "load_base",
    "load_base_shapes",
    "load_folder",
    "load_part",
    "load_pickled",
    "local_folder",
    "open_base",
    "open_weights",
    "read_json",
    "save_folder",
    "save_part",
    "survey_base",
    "torch_name",
    "write_json",
]
