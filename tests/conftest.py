"""Settings of all tests: two host devices, and compiled programs kept between runs."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir(), "e4t_jax_tests_cache")))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import pytest


def tiny_base(**unet_options):
    """A base of the world's architecture at 16×16 pixels with random weights, and its tokenizer."""
    from e4t_jax.backbone import Base, random_params
    from e4t_jax.world.base_config import base_configs
    from e4t_jax.world.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    configs = base_configs(len(tokenizer), tokenizer.eos_token_id)
    small = {"block_out_channels": [32, 32], "layers_per_block": 1, "sample_size": 4, "in_channels": 4, "out_channels": 4}
    configs["unet"] |= {**small, "cross_attention_dim": 16, "attention_head_dim": 2, **unet_options}
    configs["vae"] |= {"block_out_channels": [4, 4, 8], "latent_channels": 4, "sample_size": 16, "norm_num_groups": 1}
    for kind in ("down", "up"):
        configs["vae"][f"{kind}_block_types"] = configs["vae"][f"{kind}_block_types"][:3]
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": 8}
    configs["text_encoder"] |= narrow
    configs["image_encoder"] |= {**narrow, "image_size": 16, "patch_size": 8}
    base = Base(configs, tokenizer)
    return base, random_params(base, jax.random.key(0))


@pytest.fixture(scope="session")
def domain():
    """A tiny domain with random weights and offsets that do something."""
    from e4t_jax.domain import Domain, make_method
    from e4t_jax.pretrain import init_trainable

    base, params = tiny_base()
    trainable = init_trainable(make_method(base, "creature"), jax.random.key(1))
    factors = jax.tree.map(lambda leaf: leaf + 0.02 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape)), trainable.factors)
    encoder = {**trainable.encoder, "final": jax.tree.map(lambda leaf: 50 * leaf, trainable.encoder["final"])}
    return Domain("creatures", "creature", base, params, encoder, factors)


@pytest.fixture(scope="session")
def concept_batch(domain):
    """Four random pictures' latents, features and prompts, with a mask."""
    from e4t_jax import backbone
    from e4t_jax.objective import ConceptBatch
    from e4t_jax.prompts import tokenize

    keys = jax.random.split(jax.random.key(2), 3)
    prompts = ["*s", "a photo of *s", "a cartoon of *s in the snow", "*s in the city"]
    ids, placeholder = tokenize(domain.base.tokenizer, prompts)
    return ConceptBatch(
        latents=jax.random.normal(keys[0], (4, *domain.base.latent_shape)),
        clip=jax.random.normal(keys[1], (4, backbone.feature_count(domain.base), domain.base.clip_width)),
        ids=jnp.asarray(ids),
        placeholder=jnp.asarray(placeholder),
        mask=jax.random.uniform(keys[2], (4, *domain.base.latent_shape[:2])),
    )
