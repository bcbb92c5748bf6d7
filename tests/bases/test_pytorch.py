"""A base computes what PyTorch's classes do that read its files, and says what is wrong with files.

Networks alone, in every variant and with their gradients: `test_stable_diffusion`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_networks import relative

from e4t_jax import bases
from e4t_jax.errors import UserError
from e4t_jax.testing import tiny_base


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base of Stable Diffusion 2's kind: linear projections, heads per block, exact GELU in the text encoder."""
    base, params = tiny_base(use_linear_projection=True, block_out_channels=[32, 64], attention_head_dim=[2, 4])
    configs = {**base.configs, "text_encoder": {**base.configs["text_encoder"], "hidden_act": "gelu"}}
    base = bases.StableDiffusion(configs, base.tokenizer)
    # Random biases and scales too, lest a swap of two of them go unnoticed.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    params = jax.tree.unflatten(tree, [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
    folder = tmp_path_factory.mktemp("base")
    bases.save_folder(folder, base, params, np.float32)
    return folder, base, params


@pytest.mark.compiles
def test_unet_matches_pytorch(saved):
    """Prediction, relative error 1e-4; `feature_width` is that of φ_unet."""
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    folder, base, params = saved
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, *base.latent_shape)).astype(np.float32)
    text = rng.standard_normal((2, 5, base.unet.cross_attention_dim)).astype(np.float32)
    t = np.array([10, 700])
    with torch.no_grad():
        theirs = unet(torch.tensor(z).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(text)).sample.permute(0, 2, 3, 1)
    ours, features = jax.jit(lambda p: base.denoise(p, z, jnp.asarray(t), text))(params["unet"])
    assert relative(ours, theirs) < 1e-4
    assert features.shape[1] == base.feature_width


@pytest.mark.compiles
def test_vae_matches_pytorch(saved):
    """Encoding (mean) and decoding, relative error 1e-4."""
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    folder, base, params = saved
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    images = np.random.default_rng(1).uniform(-1, 1, (2, base.image_size, base.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        mean = vae.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist.mean
        restored = vae.decode(mean).sample.permute(0, 2, 3, 1)
    latents = base.encode(params["vae"], jnp.asarray(images))
    assert relative(latents / base.scaling_factor, mean.permute(0, 2, 3, 1)) < 1e-4
    assert relative(base.decode(params["vae"], latents), restored) < 1e-4


@pytest.mark.compiles
def test_text_encoder_matches_pytorch(saved):
    """States and projected embedding, relative error 1e-4."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPTextModelWithProjection

    folder, base, params = saved
    model = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder").eval()
    ids = np.asarray(base.tokenizer(["a photo of a red creature", ""], padding="max_length").input_ids)
    with torch.no_grad():
        theirs = model(torch.tensor(ids))
    assert relative(base.read(params["text_encoder"], jnp.asarray(ids)), theirs.last_hidden_state) < 1e-4
    assert relative(base.embed_text(params["text_encoder"], jnp.asarray(ids)), theirs.text_embeds) < 1e-4


@pytest.mark.compiles
def test_image_encoder_matches_pytorch(saved):
    """Projected embedding and φ_clip (class tokens of every second layer, normed), relative error 1e-4."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPVisionModelWithProjection

    folder, base, params = saved
    model = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval()
    images = np.random.default_rng(2).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor(((images + 1) / 2 - mean) / deviation, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = model(pixels, output_hidden_states=True)
        states = [model.vision_model.post_layernorm(state[:, 0]) for state in theirs.hidden_states[2::2]]
    assert relative(base.image_encoder.embed(params["image_encoder"], jnp.asarray(images)), theirs.image_embeds) < 1e-4
    features = base.image_encoder.see(params["image_encoder"], jnp.asarray(images))
    assert features.shape == (2, base.image_encoder.count, base.image_encoder.width)
    assert relative(features, torch.stack(states, dim=1)) < 1e-4


@pytest.mark.compiles
def test_saved_base_is_read_back_exactly(saved):
    folder, base, params = saved
    again, loaded = bases.load_folder(folder)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(before, after)
    assert again.tokenizer("a red creature").input_ids == base.tokenizer("a red creature").input_ids
    assert again.scheduler == base.scheduler


@pytest.mark.compiles
def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path):
    base, params = tiny_base()
    bases.save_folder(tmp_path, base, params)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model.safetensors is damaged .*copy it again"):
        bases.load_folder(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"unet holds no diffusion_pytorch_model.safetensors"):
        bases.load_folder(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_checksums": {}}))
    bases.save_part(tmp_path, "unet", {name: part for name, part in params["unet"].items() if name != "conv_in"})
    with pytest.raises(UserError, match=r"lacks the tensor conv_in\."):
        bases.load_folder(tmp_path)
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        bases.load_folder(tmp_path / "nowhere")
