"""Tiny bases and domains with random weights: tests of code that builds on this package run in seconds with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e4t_jax.bases import Params, StableDiffusion, load_base, save_folder
from e4t_jax.concept import Concept
from e4t_jax.creatures.learning.base_config import base_configs
from e4t_jax.creatures.learning.tokenizer import build_tokenizer
from e4t_jax.data.images import encode_png
from e4t_jax.domain import Domain
from e4t_jax.files.concept_files import save_concept
from e4t_jax.files.domain_files import load_domain, save_domain
from e4t_jax.objective import make_method
from e4t_jax.pretraining.step import init_trainable
from e4t_jax.storage import write_file
from e4t_jax.tuning.scopes import SCOPES
from e4t_jax.tuning.tune import start


def tiny_base(**unet_options: Any) -> tuple[StableDiffusion, Params]:
    """A base of Stable Diffusion's architecture at 16×16 pixels; `unet_options` are keys of the U-Net's configuration."""
    tokenizer = build_tokenizer()
    configs = base_configs(len(tokenizer), tokenizer.eos_token_id)
    small = {"block_out_channels": [32, 32], "layers_per_block": 1, "sample_size": 4, "in_channels": 4, "out_channels": 4}
    configs["unet"] |= {**small, "cross_attention_dim": 16, "attention_head_dim": 2, **unet_options}
    configs["vae"] |= {"block_out_channels": [4, 4, 8], "latent_channels": 4, "sample_size": 16, "norm_num_groups": 1}
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": 8}
    configs["text_encoder"] |= narrow
    configs["image_encoder"] |= {**narrow, "image_size": 16, "patch_size": 8}
    base = StableDiffusion(configs, tokenizer)
    return base, base.random_params(jax.random.key(0))


def tiny_domain() -> Domain:
    """A domain on `tiny_base` whose encoder and offsets do something."""
    base, params = tiny_base()
    trainable = init_trainable(make_method(base, "creature"), jax.random.key(1))
    factors = jax.tree.map(lambda leaf: leaf + 0.02 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape)), trainable.factors)
    encoder = {**trainable.encoder, "final": jax.tree.map(lambda leaf: 50 * leaf, trainable.encoder["final"])}
    return Domain("creatures", "creature", base, params, encoder=encoder, factors=factors)


class World(NamedTuple):
    """Files of a tiny domain, as a user has them."""

    base: Path
    domain: Path
    concepts: tuple[Path, ...]
    pictures: Path  # a folder of four


def write_tiny_world(folder: Path) -> World:
    """Base, domain, two concepts and four pictures in `folder`, all with random content and nothing compiled."""
    tiny = tiny_domain()
    world = World(
        folder / "base", folder / "domain", (folder / "venus.safetensors", folder / "ada.safetensors"), folder / "pictures"
    )
    save_folder(world.base, *tiny_base())
    base, params = load_base(str(world.base))
    save_domain(world.domain, dataclasses.replace(tiny, base_name=str(world.base), base=base, params=params))
    loaded = load_domain(world.domain)
    for index, path in enumerate(world.concepts):
        trainable = start(loaded.method, loaded.frozen, SCOPES["compact"], jax.random.key(index))
        save_concept(path, Concept(path.stem, "compact", loaded.fingerprint, trainable, jnp.ones(loaded.base.image_encoder.width)))
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        write_file(world.pictures / f"{index}.png", encode_png(pixels))
    return world
