"""Stable Diffusion's networks are the last Flax classes of diffusers and transformers: `make test-flax`.

They have the same trees of weights, and compute the same to a relative 1e-4.
"""

import jax
import jax.numpy as jnp
import pytest
from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel
from diffusers.models.vae_flax import FlaxAutoencoderKL
from tiny_networks import (
    IDS,
    IMAGES,
    PIXELS,
    TEXT,
    UNET,
    UNETS,
    VAE,
    VISION,
    random_params,
    relative,
    run_once,
    shapes_of,
    unet_inputs,
)
from transformers import CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextModule, FlaxCLIPVisionModule

from e4t_jax.bases.stable_diffusion import module_of


def frozen(config):
    """A configuration with tuples for lists, as Flax asks of its fields."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def assert_same_tree(init, shapes):
    assert jax.tree.map(jnp.shape, jax.eval_shape(init)["params"]) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.parametrize("variant", ["sd1", "sd2", "deeper"])
def test_unet_is_the_flax_class_of_diffusers(variant, monkeypatch):
    """Once their two deviations from PyTorch are taken over: GELU by tanh, and ε before transformers."""
    monkeypatch.setattr("e4t_jax.bases.stable_diffusion.unet.gelu", jax.nn.gelu)  # by tanh
    monkeypatch.setattr("e4t_jax.bases.stable_diffusion.unet._TRANSFORMER_EPSILON", 1e-5)
    config = {**UNET, **UNETS[variant]}
    z, *rest = unet_inputs(config)
    theirs, nchw = FlaxUNet2DConditionModel(**frozen(config)), z.transpose(0, 3, 1, 2)
    shapes = shapes_of("unet", config)
    assert_same_tree(lambda: theirs.init(jax.random.key(0), nchw, *rest), shapes)
    variables = {"params": random_params(shapes)}
    ours = run_once(module_of("unet", config).apply, variables, z, *rest)[0]
    expected = run_once(lambda *given: theirs.apply(*given).sample, variables, nchw, *rest)
    assert relative(ours, expected.transpose(0, 2, 3, 1)) < 1e-4


def test_vae_is_the_flax_class_of_diffusers():
    theirs, images = FlaxAutoencoderKL(**frozen(VAE)), IMAGES.transpose(0, 3, 1, 2)
    shapes = shapes_of("vae", VAE)
    assert_same_tree(lambda: theirs.init(jax.random.key(0), images), shapes)
    variables = {"params": random_params(shapes)}
    ours = run_once(module_of("vae", VAE).apply, variables, IMAGES)
    expected = run_once(lambda *given: theirs.apply(*given).sample, variables, images)
    assert relative(ours, expected.transpose(0, 2, 3, 1)) < 1e-4


def test_text_tower_is_the_flax_class_of_transformers():
    theirs, places = FlaxCLIPTextModule(CLIPTextConfig(**TEXT)), jnp.arange(IDS.shape[1])[None]
    shapes = shapes_of("text_encoder", TEXT)
    assert_same_tree(lambda: theirs.init(jax.random.key(0), IDS, None, places), shapes)
    variables = {"params": random_params(shapes)}
    expected = theirs.apply(variables, IDS, None, places).last_hidden_state
    assert relative(module_of("text_encoder", TEXT).apply(variables, IDS, method="read"), expected) < 1e-4


def test_vision_tower_is_the_flax_class_of_transformers():
    theirs = FlaxCLIPVisionModule(CLIPVisionConfig(**VISION))
    shapes = shapes_of("image_encoder", VISION)
    assert_same_tree(lambda: theirs.init(jax.random.key(0), PIXELS), shapes)
    variables = {"params": random_params(shapes)}
    expected = theirs.apply(variables, PIXELS).pooler_output
    assert relative(module_of("image_encoder", VISION).apply(variables, PIXELS, method="pool"), expected) < 1e-4
