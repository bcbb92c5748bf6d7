"""The true geometries of Stable Diffusion 1.5 and 2.1 and of the CLIP image encoders, for random weights without a download.

Facts of the models' own configuration files: what is large about them, as opposed to what they have learned.
"""

from __future__ import annotations

from typing import Any

from e4t_jax.errors import UserError

VOCABULARY = 49408  # CLIP's
TEXT_LENGTH = 77

_CROSS = "CrossAttn"
_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": [f"{_CROSS}DownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + [f"{_CROSS}UpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
}
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
_TEXT = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": VOCABULARY,
    "max_position_embeddings": TEXT_LENGTH,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
}
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
_VISION = {"architectures": ["CLIPVisionModelWithProjection"], "image_size": 224, "patch_size": 14, "num_attention_heads": 16}

BASES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {**_UNET, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768},
        "vae": {**_VAE, "sample_size": 512},
        "text_encoder": {
            **_TEXT,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
            "hidden_act": "quick_gelu",
        },
        "scheduler": {**_SCHEDULER, "_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "epsilon"},
    },
    "sd21": {
        "unet": {
            **_UNET,
            "sample_size": 96,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        "vae": {**_VAE, "sample_size": 768},
        # 23 of OpenCLIP's 24 layers: the states that the U-Net was trained on are the last but one's.
        "text_encoder": {
            **_TEXT,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": 512,
            "hidden_act": "gelu",
        },
        "scheduler": {**_SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    },
}

IMAGE_ENCODERS: dict[str, dict[str, Any]] = {
    "vit-l14": {
        **_VISION,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    "vit-h14": {
        **_VISION,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
}


def geometry(name: str, image_encoder: str) -> dict[str, dict[str, Any]]:
    """The configurations of "sd15" or "sd21" with "vit-l14" or "vit-h14", keyed by part.

    Errors: `UserError` for another name.
    """
    if name not in BASES:
        raise UserError(f"random:{name} is unknown; choose one of {', '.join(f'random:{one}' for one in BASES)}.", "base")
    return {**BASES[name], "image_encoder": image_encoder_geometry(image_encoder)}


def image_encoder_geometry(name: str) -> dict[str, Any]:
    """The configuration of CLIP's image encoder "vit-l14" or "vit-h14".

    Errors: `UserError` for another name.
    """
    if name not in IMAGE_ENCODERS:
        known = ", ".join(f"random:{one}" for one in IMAGE_ENCODERS)
        raise UserError(f"random:{name} is unknown; choose one of {known}, a Hub id or a folder.", "image_encoder")
    return IMAGE_ENCODERS[name]
