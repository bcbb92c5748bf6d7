"""Geometry of the embedded world's base model: Stable Diffusion's architecture in small, at 32 by 32 pixels."""

from __future__ import annotations

import jax

from e4t_jax.bases import Params, StableDiffusion
from e4t_jax.creatures.learning.tokenizer import build_tokenizer
from e4t_jax.creatures.world.captions import CAPTION_LENGTH
from e4t_jax.creatures.world.renderer import IMAGE_SIZE

_TEXT_WIDTH = 128
_LATENT_CHANNELS = 16


def base_configs(vocabulary_size: int, end_token: int) -> dict[str, dict]:
    """The five configurations, keyed and worded as in a diffusers folder."""
    return {
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": _LATENT_CHANNELS,
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "block_out_channels": [24, 48, 64],
            "layers_per_block": 1,
            "norm_num_groups": 1,
            "sample_size": IMAGE_SIZE,
            "scaling_factor": 1.0,
        },
        "unet": {
            "sample_size": IMAGE_SIZE // 4,
            "in_channels": _LATENT_CHANNELS,
            "out_channels": _LATENT_CHANNELS,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "block_out_channels": [64, 128],
            "layers_per_block": 1,
            "cross_attention_dim": _TEXT_WIDTH,
            "attention_head_dim": 4,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModelWithProjection"],
            "vocab_size": vocabulary_size,
            "hidden_size": _TEXT_WIDTH,
            "intermediate_size": 4 * _TEXT_WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": CAPTION_LENGTH,
            "projection_dim": _TEXT_WIDTH,
            "hidden_act": "quick_gelu",
            "bos_token_id": end_token - 1,
            "eos_token_id": end_token,
        },
        "image_encoder": {
            "architectures": ["CLIPVisionModelWithProjection"],
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 4,
            "projection_dim": _TEXT_WIDTH,
            "hidden_act": "quick_gelu",
        },
        "scheduler": {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
    }


def new_base(key: jax.Array) -> tuple[StableDiffusion, Params]:
    """The base model before training."""
    tokenizer = build_tokenizer()
    base = StableDiffusion(base_configs(len(tokenizer), tokenizer.eos_token_id), tokenizer)
    return base, base.random_params(key)
