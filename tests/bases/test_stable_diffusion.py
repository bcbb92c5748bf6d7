"""Stable Diffusion's networks compute what PyTorch's do, in every variant; gradients too, and whatever the policy.

Tiny geometries, random weights; "relative" is the largest difference over the largest entry.
"""

import dataclasses
import functools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_networks import (
    CLIPS,
    HOW,
    IDS,
    IMAGES,
    PIXELS,
    UNET,
    UNETS,
    VAE,
    VAES,
    draw,
    random_params,
    relative,
    run_once,
    shapes_of,
    unet_inputs,
)

from e4t_jax.bases import Weights, fill_part, torch_name
from e4t_jax.bases.stable_diffusion import Policy, check_config, layers, module_of
from e4t_jax.bases.stable_diffusion.attention import attend
from e4t_jax.bases.stable_diffusion.names import to_torch
from e4t_jax.errors import UserError


def torch_model(part, config):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    kinds = {
        "unet": lambda: diffusers.UNet2DConditionModel(**config),
        "vae": lambda: diffusers.AutoencoderKL(**config),
        "text_encoder": lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)),
        "image_encoder": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config)),
    }
    return kinds[part]().eval()


class Pair:
    """A network of ours and PyTorch's, of one configuration and the same random weights."""

    def __init__(self, part, variant):
        torch = pytest.importorskip("torch")
        variants, common = HOW[part]
        self.config = {**common, **variants[variant]}
        self.module, self.theirs = module_of(part, self.config), torch_model(part, self.config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.theirs.parameters():
                # Larger biases and scales than at the start of a training, lest a swap of two of them go unnoticed.
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        named = {name: weight.detach().numpy() for name, weight in self.theirs.named_parameters()}
        named.pop({"text_encoder": "text_projection.weight", "image_encoder": "visual_projection.weight"}.get(part), None)
        self.shapes = shapes_of(part, self.config)
        self.names = {path: torch_name(part, path) for path in flatten_dict(self.shapes, sep="/")}
        assert sorted(self.names.values()) == sorted(named)
        read = {name: partial(np.asarray, value) for name, value in named.items()}
        self.params = fill_part(Weights(Path("random"), read), part, self.shapes)

    def check(self, run, their_run, gradients=True, tolerance=1e-4):
        """Outputs of both, and the gradients of the mean of their squares by every weight."""

        def loss(params):
            outputs = run(params)
            return sum(jnp.square(output).mean() for output in outputs), outputs

        outputs = their_run(self.theirs)
        if gradients:
            (_, ours), changes = run_once(jax.value_and_grad(loss, has_aux=True), self.params)
        else:
            ours = run_once(run, self.params)
        for mine, theirs in zip(ours, outputs, strict=True):
            assert relative(mine, theirs.detach().numpy()) < tolerance
        if not gradients:
            return
        sum(output.square().mean() for output in outputs).backward()
        weights = dict(self.theirs.named_parameters())
        flat = {path: to_torch(path, np.asarray(leaf)) for path, leaf in flatten_dict(changes, sep="/").items()}
        expected = {path: weights[name].grad for path, name in self.names.items()}
        largest = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
        for path, grad in expected.items():
            grad = np.zeros_like(flat[path]) if grad is None else grad.numpy()
            # Over the entries of the weight, or of all weights where its own gradient is zero but for rounding.
            assert np.abs(flat[path] - grad).max() < tolerance * max(np.abs(grad).max(), 1e-2 * largest), path


def nchw(x):
    torch = pytest.importorskip("torch")
    return torch.tensor(x).permute(0, 3, 1, 2)


@pytest.mark.compiles
@pytest.mark.parametrize("variant", UNETS)
def test_unet_is_pytorchs(variant):
    """Prediction, φ_unet (their hooks', pooled; alone too) and gradients, relative 1e-4."""
    torch = pytest.importorskip("torch")
    pair = Pair("unet", variant)
    z, t, text = unet_inputs(pair.config)

    def their_run(unet):
        kept, middle = [], []
        unet.conv_in.register_forward_hook(lambda m, i, output: kept.append(output))
        for block in unet.down_blocks:
            block.register_forward_hook(lambda m, i, output: kept.extend(output[1]))
        unet.mid_block.register_forward_hook(lambda m, i, output: middle.append(output))
        predicted = unet(nchw(z), torch.tensor(np.asarray(t)), torch.tensor(text)).sample.permute(0, 2, 3, 1)
        return predicted, *[torch.cat([one.mean(dim=(2, 3)) for one in (*kept, *middle)], dim=1)] * 2

    def run(params):
        features = pair.module.apply({"params": params}, z, t, text, method="features")
        return *pair.module.apply({"params": params}, z, t, text), features

    # The gradients of the rest come of the same code.
    pair.check(run, their_run, gradients=variant in ("sd1", "sd2"))


@pytest.mark.compiles
@pytest.mark.parametrize("variant", VAES)
def test_vae_is_pytorchs(variant):
    """Mean and log variance, the picture of other latents, and gradients, relative 1e-4."""
    pair = Pair("vae", variant)
    latents = draw(5, 2, 8, 8, pair.module.latent_channels)

    def run(params):
        posterior = pair.module.apply({"params": params}, IMAGES, method="encode")
        return *posterior, pair.module.apply({"params": params}, latents, method="decode")

    def their_run(vae):
        posterior = vae.encode(nchw(IMAGES)).latent_dist
        outputs = posterior.mean, posterior.logvar, vae.decode(nchw(latents)).sample
        return [output.permute(0, 2, 3, 1) for output in outputs]

    pair.check(run, their_run)


@pytest.mark.parametrize("variant", CLIPS)
def test_text_tower_is_pytorchs(variant):
    """States, the pooled state and gradients, relative 1e-4."""
    torch = pytest.importorskip("torch")
    pair = Pair("text_encoder", variant)

    def run(params):
        states = pair.module.apply({"params": params}, jnp.asarray(IDS), method="read")
        return states, pair.module.pool(states, jnp.asarray(IDS))

    def their_run(text):
        outputs = text.text_model(torch.tensor(IDS))
        return outputs.last_hidden_state, outputs.pooler_output

    pair.check(run, their_run)


def test_words_from_elsewhere_take_the_place_of_ids():
    torch = pytest.importorskip("torch")
    pair = Pair("text_encoder", "quick_gelu")
    words = np.asarray(pair.module.apply({"params": pair.params}, IDS, method="look_up")).copy()
    words[0, 1] = 0.3
    with torch.no_grad():
        pair.theirs.text_model.embeddings.token_embedding = torch.nn.Embedding.from_pretrained(torch.tensor(words[0]))
        theirs = pair.theirs(torch.arange(9)[None]).last_hidden_state
    assert relative(pair.module.apply({"params": pair.params}, words[:1]), theirs) < 1e-4


@pytest.mark.parametrize("variant", CLIPS)
def test_vision_tower_is_pytorchs(variant):
    """All states, the pooled one and gradients, relative 1e-4."""
    pair = Pair("image_encoder", variant)

    def run(params):
        states = pair.module.apply({"params": params}, PIXELS)
        return *states, pair.module.apply({"params": params}, PIXELS, method="pool")

    def their_run(vision):
        outputs = vision.vision_model(nchw(PIXELS), output_hidden_states=True)
        return *outputs.hidden_states, outputs.pooler_output

    pair.check(run, their_run)


SHALLOW = {
    **UNET,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "block_out_channels": [16],
    "norm_num_groups": 8,
}


@functools.cache
def unet_gradient(policy):
    module, inputs = module_of("unet", SHALLOW, policy), unet_inputs(SHALLOW)

    def loss(params):
        predicted, features = module.apply({"params": params}, *inputs)
        assert predicted.dtype == features.dtype == jnp.float32
        return jnp.square(predicted).mean() + jnp.square(features).mean()

    params = random_params(shapes_of("unet", SHALLOW, policy))
    value, gradient = run_once(jax.value_and_grad(loss), params)
    return float(value), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])


@pytest.mark.parametrize("rows", [(5,), (2, 3), (2, 3, 4)])
def test_the_gradient_of_a_product_is_numpys(rows):
    """x W and both its gradients, in float32 to 1e-6 of the largest number."""
    generator = np.random.default_rng(0)
    x, kernel, change = (generator.standard_normal(shape).astype(np.float32) for shape in ((*rows, 7), (7, 9), (*rows, 9)))
    made, back = jax.vjp(layers.product, x, kernel)
    flat = [part.reshape(-1, part.shape[-1]) for part in (x, change)]
    for ours, theirs in zip((made, *back(change)), (x @ kernel, change @ kernel.T, flat[0].T @ flat[1]), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.compiles
def test_rematerialisation_changes_memory_alone():
    """Same tree, gradient relative 1e-5."""
    plain, remat = (shapes_of("unet", SHALLOW, Policy(remat=name)) for name in ("none", "blocks"))
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, remat)
    (loss, gradient), (again, other) = (unet_gradient(Policy(remat=name)) for name in ("none", "blocks"))
    assert np.isclose(loss, again, rtol=1e-6)
    assert relative(other, gradient) < 1e-5
    module, inputs = module_of("unet", SHALLOW, Policy(remat="blocks")), unet_inputs(SHALLOW)
    traced = jax.make_jaxpr(lambda p: module.apply({"params": p}, *inputs))(random_params(plain))
    assert "remat" in str(traced)


@pytest.mark.compiles
def test_half_precision_comes_near():
    """bfloat16 computation of float32 weights: loss within 2 %, cosine of the gradients 0.99."""
    (loss, gradient), (again, other) = (unet_gradient(Policy(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert abs(again / loss - 1) < 0.02
    assert other.dtype == np.float32
    assert gradient @ other / np.linalg.norm(gradient) / np.linalg.norm(other) > 0.99
    variables = {"params": random_params(shapes_of("vae", VAE))}
    half, full = (module_of("vae", VAE, Policy(dtype=dtype)).apply(variables, IMAGES) for dtype in ("bfloat16", "float32"))
    assert half.dtype == jnp.float32
    assert relative(half, full) < 0.05


LARGE = {**UNET, "sample_size": 32, "block_out_channels": [32, 64], "attention_head_dim": 2}


def lowered(platform, policy, gradient=False):
    module, inputs = module_of("unet", LARGE, policy), unet_inputs(LARGE, batch=1)

    def run(params):
        return jnp.square(module.apply({"params": params}, *inputs)[0]).mean()

    shapes = shapes_of("unet", LARGE)
    return jax.jit(jax.grad(run) if gradient else run).trace(shapes).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.compiles
def test_kernels_are_chosen_at_lowering(monkeypatch):
    """On this machine, whatever it has: a flash kernel for TPU, none for CPU, no branches left, and no device asked for."""

    def asked():
        raise AssertionError("asked for the default backend while tracing")

    shapes_of("unet", LARGE)
    monkeypatch.setattr(jax, "default_backend", asked)
    for gradient in (False, True):
        assert "tpu_custom_call" in lowered("tpu", Policy(), gradient)
    assert "tpu_custom_call" not in lowered("tpu", Policy(attention="xla"))
    assert "tpu_custom_call" not in lowered("cpu", Policy())
    lowered("cuda", Policy(dtype="bfloat16"))


@pytest.mark.compiles
def test_choice_of_kernels_maps_differentiates_and_costs_nothing():
    """Long attention and small deep convolutions: their plain forms' values and gradients, mapped, to 1e-4; no branch left."""
    heads = jnp.asarray(draw(0, 2, 3, 1, 1024, 2, 8))  # mapped, (query, key, value), batch, tokens, heads, width
    maps, kernels = jnp.asarray(draw(1, 2, 1, 8, 8, 48)), jnp.asarray(draw(2, 2, 3, 3, 48, 8))
    chosen = layers.Conv(8, policy=Policy())

    def attention(name):
        return lambda qkv: jnp.square(attend(*qkv, Policy(attention=name))).sum()

    def convolution(x, kernel):
        return jnp.square(chosen.apply({"params": {"kernel": kernel, "bias": jnp.zeros(8)}}, x)).sum()

    def plain(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jnp.square(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)).sum()

    for ours, theirs, inputs in (
        (attention("auto"), attention("xla"), (heads,)),
        (convolution, plain, (maps, kernels)),
    ):
        arguments = tuple(range(len(inputs)))
        compiled = jax.jit(jax.vmap(jax.value_and_grad(ours, arguments))).lower(*inputs).compile()
        assert " conditional(" not in compiled.as_text()
        expected = jax.vmap(jax.value_and_grad(theirs, arguments))(*inputs)
        for one, other in zip(jax.tree.leaves(compiled(*inputs)), jax.tree.leaves(expected), strict=True):
            assert relative(one, other) < 1e-4


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "time_cond_proj_dim", 256),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "addition_embed_type", "text_time"),
        ("unet", "only_cross_attention", True),
        ("unet", "dual_cross_attention", True),
        ("unet", "resnet_time_scale_shift", "scale_shift"),
        ("unet", "in_channels", 9),
        ("unet", "act_fn", "snake"),
        ("unet", "layers_per_block", [1, 2]),
        ("unet", "down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("unet", "mid_block_type", "UNetMidBlock2D"),
        ("unet", "_class_name", "UNet3DConditionModel"),
        ("unet", "a_key_of_tomorrow", 3),
        # null is no default: PyTorch's classes leave out the norm, read it as false, or fail.
        ("unet", "norm_num_groups", None),
        ("unet", "flip_sin_to_cos", None),
        ("unet", "downsample_padding", None),
        ("unet", "cross_attention_dim", None),
        ("unet", "resnet_time_scale_shift", None),
        ("unet", "norm_num_groups", 7),
        ("unet", "norm_eps", "1e-5"),
        ("unet", "sample_size", [8, 8]),
        ("unet", "layers_per_block", 1.5),
        ("unet", "layers_per_block", True),
        ("unet", "attention_head_dim", [2, 4, 4]),
        ("unet", "up_block_types", ["UpBlock2D"]),
        ("unet", "num_attention_heads", 8),
        ("unet", "conv_in_kernel", 1),
        ("vae", "scaling_factor", None),
        ("vae", "scaling_factor", float("nan")),
        ("vae", "norm_num_groups", None),
        ("vae", "in_channels", 4),
        ("vae", "latents_mean", [0.0]),
        ("text_encoder", "use_attention_mask", True),
        ("text_encoder", "layer_norm_eps", None),
        ("text_encoder", "hidden_act", None),
        ("image_encoder", "image_size", "224"),
        ("vae", "use_quant_conv", False),
        ("vae", "shift_factor", 0.1),
        ("vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 2),
        ("text_encoder", "hidden_act", "swiglu"),
        ("text_encoder", "model_type", "t5"),
        ("image_encoder", "num_channels", 4),
    ],
)
def test_a_key_that_would_change_the_numbers_is_refused_by_name(part, key, value):
    with pytest.raises(UserError, match=rf"^folder/config.json.*{key}[^\n]*$"):
        check_config(part, {**HOW[part][1], key: value}, "folder/config.json")


def test_keys_that_change_nothing_are_passed_over():
    """Every key that PyTorch's classes write into their own configurations, at its default."""
    for part, (_, config) in HOW.items():
        written = dict(torch_model(part, config).config) if part in ("unet", "vae") else torch_model(part, config).config.to_dict()
        assert module_of(part, written).policy == Policy()
    check_config("unet", {**UNET, "upcast_attention": True, "dropout": 0.1})


def test_fields_are_pytorchs_defaults():
    """What a configuration leaves out is what PyTorch's class takes."""
    import inspect

    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        defaults = {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items()}
        for field in dataclasses.fields(type(module_of(part, {}))):
            if field.name in defaults and field.name != "sample_size":
                assert field.default == defaults[field.name], field.name
