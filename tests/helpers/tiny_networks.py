"""Stable Diffusion's networks in tiny geometries, their inputs and random weights, and how far two results are apart."""

import jax
import jax.numpy as jnp
import numpy as np

from e4t_jax.bases.stable_diffusion import Policy, module_of

UNET = {
    "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
UNETS = {
    "sd1": {},
    "sd2": {"attention_head_dim": [2, 4], "use_linear_projection": True},
    "groups of 8, gelu": {"norm_num_groups": 8, "act_fn": "gelu"},
    "groups of 16": {"norm_num_groups": 16, "layers_per_block": 2, "norm_eps": 1e-3, "act_fn": "mish"},
    "other times": {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "mid_block_scale_factor": 2.0},
    "deeper": {"transformer_layers_per_block": 2, "attention_head_dim": 2},
}
VAES = {
    "sd": {},
    "groups of 16, gelu": {"norm_num_groups": 16, "act_fn": "gelu", "layers_per_block": 2, "latent_channels": 8},
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [16, 32],
    "norm_num_groups": 8,
}
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIPS = {"quick_gelu": {}, "gelu": {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_attention_heads": 4}}
TEXT = {**CLIP, "vocab_size": 50, "max_position_embeddings": 9, "bos_token_id": 48, "eos_token_id": 49, "projection_dim": 8}
VISION = {**CLIP, "image_size": 12, "patch_size": 4, "projection_dim": 8}
HOW = {"unet": (UNETS, UNET), "vae": (VAES, VAE), "text_encoder": (CLIPS, TEXT), "image_encoder": (CLIPS, VISION)}

# Compiled in a hurry: each program here runs once.
HURRY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def run_once(function, *args):
    return jax.jit(function).lower(*args).compile(compiler_options=HURRY)(*args)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def unet_inputs(config, batch=2):
    size, channels = config["sample_size"], config.get("in_channels", 4)
    t = jnp.linspace(3, 900, batch).astype(jnp.int32)
    return draw(0, batch, size, size, channels), t, draw(1, batch, 5, config["cross_attention_dim"])


IDS = np.array([[48, 3, 9, 49, 49, 49, 49, 49, 49], [48, 7, 7, 1, 2, 3, 4, 5, 49]])
IMAGES = draw(2, 2, 16, 16, 3)
PIXELS = draw(3, 2, 12, 12, 3)


def shapes_of(part, config, policy=Policy()):  # noqa: B008, frozen
    module, key = module_of(part, config, policy), jax.random.key(0)
    inputs = {
        "unet": lambda: module.init(key, *unet_inputs(config)),
        "vae": lambda: module.init(key, IMAGES),
        "text_encoder": lambda: module.init(key, jnp.asarray(IDS), method="read"),
        "image_encoder": lambda: module.init(key, PIXELS, method="pool"),
    }
    return jax.eval_shape(inputs[part])["params"]


def random_params(shapes, seed=0):
    leaves, tree = jax.tree.flatten(shapes)
    values = [draw(seed + i, *leaf.shape) * max(1, np.prod(leaf.shape[:-1])) ** -0.5 for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, values)


def relative(ours, theirs):
    """The largest difference over the largest entry."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()
