"""The encoder is the paper's, folded or not, and starts near the domain's word with a gradient everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax.encoder import ConceptEncoder

BATCH, LAYERS, WIDTH, FEATURES, TEXT = 3, 4, 16, 40, 12
ENCODER = ConceptEncoder(clip_layers=LAYERS, clip_width=WIDTH, text_width=TEXT)


def features(seed=0):
    """Random φ_clip [b, L, D] and φ_unet [b, F]."""
    rng = np.random.default_rng(seed)
    shapes = (BATCH, LAYERS, WIDTH), (BATCH, FEATURES)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def fresh_variables():
    return ENCODER.init(jax.random.key(0), jnp.zeros((1, WIDTH)), jnp.zeros((1, FEATURES)))


def random_variables(seed=1):
    """Every parameter random, biases too, so that a forgotten one is seen."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.3, jnp.float32), fresh_variables())


def folded_then_applied(variables, phi_clip, phi_unet):
    return ENCODER.apply(variables, ENCODER.apply(variables, phi_clip, method="fold"), phi_unet)


def init_through(encoder, method="__call__"):
    """`encoder.init` through one of its methods, for `jax.eval_shape`."""
    return lambda *arguments: encoder.init(*arguments, method=method)


def in_torch(torch, params, phi_clip, phi_unet):
    """The encoder with torch.nn.Linear, one image and layer at a time, and its gradients, named as ours."""
    nn = torch.nn

    def linear(kernel, bias):
        layer = nn.Linear(*kernel.shape)
        layer.load_state_dict({"weight": torch.tensor(np.array(kernel.T)), "bias": torch.tensor(np.array(bias))})
        return layer

    def dense(name):
        return linear(params[name]["kernel"], params[name]["bias"])

    embedder = nn.Sequential(dense("unet_hidden"), nn.LeakyReLU(), dense("unet_output"))
    shared = linear(params["shared_kernel"], params["shared_bias"])
    each = [linear(k, b) for k, b in zip(params["layer_kernels"], params["layer_biases"], strict=True)]
    final = nn.Sequential(nn.LeakyReLU(), dense("final"))
    words = []
    for image, state in zip(phi_clip, phi_unet, strict=True):
        g = embedder(state)
        h = [layer(shared(torch.cat([phi, g]))) for layer, phi in zip(each, image, strict=True)]
        words.append(final(sum(h) / len(h)))

    def gradients():
        def of(layer):
            return {"kernel": layer.weight.grad.numpy().T, "bias": layer.bias.grad.numpy()}

        stacked = [of(layer) for layer in each]
        return {
            "unet_hidden": of(embedder[0]),
            "unet_output": of(embedder[2]),
            "shared_kernel": of(shared)["kernel"],
            "shared_bias": of(shared)["bias"],
            "layer_kernels": np.stack([one["kernel"] for one in stacked]),
            "layer_biases": np.stack([one["bias"] for one in stacked]),
            "final": of(final[1]),
        }

    return torch.stack(words), gradients


@pytest.mark.compiles
@pytest.mark.parametrize("seed", range(3))
def test_folding_the_clip_part_changes_no_number_to_1e_5(seed):
    variables, (phi_clip, phi_unet) = random_variables(seed), features(seed)
    expected = np.asarray(ENCODER.apply(variables, phi_clip, phi_unet, method="unfolded"))
    got = folded_then_applied(variables, phi_clip, phi_unet)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_fold_is_one_vector_of_the_clip_width_per_image():
    assert ENCODER.apply(random_variables(), features()[0], method="fold").shape == (BATCH, WIDTH)


@pytest.mark.parametrize("form", ["folded", "unfolded"])
def test_words_and_all_gradients_are_those_of_pytorch_to_1e_5(form):
    torch = pytest.importorskip("torch")
    variables, (phi_clip, phi_unet) = random_variables(), features()
    cotangent = np.random.default_rng(5).standard_normal((BATCH, TEXT)).astype(np.float32)

    def apply(variables, phi_clip, phi_unet):
        if form == "folded":
            return folded_then_applied(variables, phi_clip, phi_unet)
        return ENCODER.apply(variables, phi_clip, phi_unet, method="unfolded")

    inputs = [torch.tensor(x, requires_grad=True) for x in (phi_clip, phi_unet)]
    expected, gradients = in_torch(torch, variables["params"], *inputs)
    expected.backward(torch.from_numpy(cotangent))
    expected = expected.detach().numpy()

    got, gradient_of = jax.vjp(apply, variables, phi_clip, phi_unet)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    of_variables, *of_inputs = gradient_of(jnp.asarray(cotangent))

    def check(one, reference):
        np.testing.assert_allclose(one, reference, rtol=0, atol=1e-5 * np.abs(reference).max())

    jax.tree.map(check, of_variables["params"], gradients())
    for one, leaf in zip(of_inputs, inputs, strict=True):
        check(one, leaf.grad.numpy())


def test_a_fresh_encoder_says_little_and_every_parameter_feels_a_gradient():
    variables, (phi_clip, phi_unet) = fresh_variables(), features()
    word = folded_then_applied(variables, phi_clip, phi_unet)
    assert 0 < jnp.abs(word).max() < 0.05
    gradients = jax.grad(lambda v: jnp.sum(folded_then_applied(v, phi_clip, phi_unet) ** 2))(variables)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert jnp.abs(gradient).max() > 0, jax.tree_util.keystr(path)


def test_at_the_geometry_of_stable_diffusion_1_5_and_vit_h_it_has_46_million_parameters():
    encoder = ConceptEncoder(clip_layers=16, clip_width=1280, text_width=768)
    phi_clip, phi_unet = jnp.zeros((1, 16, 1280)), jnp.zeros((1, 10_880))
    variables = jax.eval_shape(init_through(encoder), jax.random.key(0), phi_clip[:, 0], phi_unet)
    also = jax.eval_shape(init_through(encoder, "unfolded"), jax.random.key(0), phi_clip, phi_unet)
    assert variables == also, "either form of the call creates all parameters"
    width, text = 1280, 768
    expected = (10_880 + 1) * width + (width + 1) * width  # φ_unet's two layers
    expected += (2 * width + 1) * width + 16 * (width + 1) * width + (width + 1) * text
    assert sum(x.size for x in jax.tree.leaves(variables)) == expected == 46_064_128
    word = jax.eval_shape(encoder.apply, variables, phi_clip[:, 0], phi_unet)
    assert word.shape == (1, 768)
