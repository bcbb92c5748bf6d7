"""Checkpoints of the public PyTorch implementation, imported: against a restatement in PyTorch from the formulas."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from e4t_jax import bases
from e4t_jax.cli import import_reference
from e4t_jax.concept import load_concept
from e4t_jax.domain_files import load_domain
from e4t_jax.errors import UserError
from e4t_jax.objective import Trainable, effective_unet

torch = pytest.importorskip("torch")

WIDTH, PATCH, GRID, LAYERS = 64, 4, 4, 2


def random_tensor(generator, *shape, scale=0.1):
    return scale * torch.randn(*shape, generator=generator)


def linear_state(generator, prefix, columns, rows):
    return {
        f"{prefix}.weight": random_tensor(generator, rows, columns, scale=columns**-0.5),
        f"{prefix}.bias": random_tensor(generator, rows),
    }


def vision_state(generator):
    """An OpenCLIP visual tower's tensors, its projection dropped."""
    state = {
        "conv1.weight": random_tensor(generator, WIDTH, 3, PATCH, PATCH),
        "class_embedding": random_tensor(generator, WIDTH),
        "positional_embedding": random_tensor(generator, GRID**2 + 1, WIDTH),
    }
    norms = ["ln_pre", "ln_post", *(f"transformer.resblocks.{i}.ln_{j}" for i in range(LAYERS) for j in (1, 2))]
    for name in norms:
        state |= {f"{name}.weight": 1 + random_tensor(generator, WIDTH), f"{name}.bias": random_tensor(generator, WIDTH)}
    for index in range(LAYERS):
        block = f"transformer.resblocks.{index}"
        state[f"{block}.attn.in_proj_weight"] = random_tensor(generator, 3 * WIDTH, WIDTH, scale=WIDTH**-0.5)
        state[f"{block}.attn.in_proj_bias"] = random_tensor(generator, 3 * WIDTH)
        state |= linear_state(generator, f"{block}.attn.out_proj", WIDTH, WIDTH)
        state |= linear_state(generator, f"{block}.mlp.c_fc", WIDTH, 2 * WIDTH)
        state |= linear_state(generator, f"{block}.mlp.c_proj", 2 * WIDTH, WIDTH)
    return {f"clip_vision.{name}": tensor for name, tensor in state.items()}


def offset_state(generator, kernels):
    state = {}
    for path, (rows, columns) in kernels.items():
        owner = bases.torch_name("unet", f"{path}/kernel").removesuffix(".weight").replace(".to_", ".wo_")
        state[f"{owner}.v"] = torch.ones(1)
        for name, inputs, outputs in (
            ("linear1", 1, rows),
            ("linear2", 1, columns),
            ("linear_column", rows, rows),
            ("linear_row", columns, columns),
        ):
            state |= linear_state(generator, f"{owner}.{name}", inputs, outputs)
    return state


@pytest.fixture(scope="module")
def reference(domain, tmp_path_factory):
    """A pretrained and a tuned checkpoint in the public formats, with random weights, and their tensors."""
    folder = tmp_path_factory.mktemp("reference")
    generator = torch.Generator().manual_seed(0)
    base = domain.base
    bases.save_folder(folder / "base", base, {part: domain.params[part] for part in ("vae", "unet", "text_encoder")}, np.float32)
    tokens = GRID**2 // 2 + 1
    encoder = vision_state(generator)
    encoder |= linear_state(generator, "unet_feature_embedder.0", base.feature_width, WIDTH)
    encoder |= linear_state(generator, "unet_feature_embedder.2", WIDTH, WIDTH)
    encoder |= linear_state(generator, "feature_linear", 2 * WIDTH, WIDTH)
    for index in range(tokens):
        encoder |= linear_state(generator, f"first_linears.{index}", WIDTH, WIDTH)
    encoder |= linear_state(generator, "final_linear", WIDTH, base.text_width)
    kernels = base.offset_kernels(base.param_shapes()["unet"])
    offsets = offset_state(generator, {path: kernel.shape for path, kernel in kernels.items()})
    settings = {
        "pretrained_model_name_or_path": "base",
        "clip_model_name_or_path": "ViT-H-14::laion2b_s32b_b79k",
        "domain_class_token": "creature",
        "placeholder_token": "*s",
        "prompt_template": "a photo of {placeholder_token}",
        "domain_embed_scale": 0.1,
        "reg_lambda": 0.01,
    }
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "base" / "unet").state_dict()
    tuned = {name: tensor + random_tensor(generator, *tensor.shape, scale=0.01) for name, tensor in unet.items()}
    for name, weights, config in (
        ("pretrained", {"weight_offsets.pt": offsets}, settings),
        ("tuned", {"unet.pt": {**tuned, **offsets}}, {"pretrained_args": settings, "learning_rate": 1e-5}),
    ):
        (folder / name).mkdir()
        for file, state in {**weights, "encoder.pt": encoder}.items():
            torch.save(state, folder / name / file)
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder, encoder, offsets


def literal_unet(folder, offsets, inputs, tuned=None):
    """PyTorch's U-Net with W' = W (1 + Δ), Δ through the literal network of linear layers; its output and φ_unet."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "base" / "unet").eval()
    if tuned is not None:
        unet.load_state_dict({name: tensor for name, tensor in tuned.items() if ".wo_" not in name})
    state = unet.state_dict()
    for owner in sorted({name.removesuffix(".v") for name in offsets if name.endswith(".v")}):

        def apply(layer, x, owner=owner):
            return torch.nn.functional.linear(x, offsets[f"{owner}.{layer}.weight"], offsets[f"{owner}.{layer}.bias"])

        v = offsets[f"{owner}.v"]
        outer = torch.outer(apply("linear1", v), apply("linear2", v))
        delta = apply("linear_row", apply("linear_column", outer.T).T)  # [in, out]
        name = owner.replace(".wo_", ".to_") + ".weight"
        state[name] = state[name] * (1 + delta.T)
    unet.load_state_dict(state)
    seen = [[], []]
    unet.conv_in.register_forward_hook(lambda m, i, o: seen[0].append(o))
    for block in unet.down_blocks:
        block.register_forward_hook(lambda m, i, o: seen[0].extend(o[1]))
    unet.mid_block.register_forward_hook(lambda m, i, o: seen[1].append(o))
    with torch.no_grad():
        output = unet(*inputs).sample
        return output, torch.cat([one.mean(dim=(2, 3)) for one in (*seen[0], *seen[1])], dim=1)


def literal_encoder(state, pixels, features):
    """The public encoder from its description, with PyTorch's own transformer layers."""
    vision = {name.removeprefix("clip_vision."): tensor for name, tensor in state.items() if name.startswith("clip_vision.")}

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (WIDTH,), vision[f"{name}.weight"], vision[f"{name}.bias"])

    patches = torch.nn.functional.conv2d(pixels, vision["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    tokens = torch.cat([vision["class_embedding"].expand(len(pixels), 1, -1), patches], dim=1)
    x = norm(tokens + vision["positional_embedding"], "ln_pre")
    for index in range(LAYERS):
        block = f"transformer.resblocks.{index}"
        attention = torch.nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        prefix = f"{block}.attn."
        attention.load_state_dict({name.removeprefix(prefix): t for name, t in vision.items() if name.startswith(prefix)})
        normed = norm(x, f"{block}.ln_1")
        x = x + attention(normed, normed, normed, need_weights=False)[0]
        hidden = norm(x, f"{block}.ln_2") @ vision[f"{block}.mlp.c_fc.weight"].T + vision[f"{block}.mlp.c_fc.bias"]
        x = x + torch.nn.functional.gelu(hidden) @ vision[f"{block}.mlp.c_proj.weight"].T + vision[f"{block}.mlp.c_proj.bias"]
    seen = torch.cat([norm(x[:, :1], "ln_post"), x[:, 1:][:, 1::2]], dim=1)

    def linear(x, name):
        return torch.nn.functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    leaky = torch.nn.functional.leaky_relu
    g = linear(leaky(linear(features, "unet_feature_embedder.0")), "unet_feature_embedder.2")
    joined = [linear(torch.cat([seen[:, index], g], dim=1), "feature_linear") for index in range(seen.shape[1])]
    mean = torch.stack([linear(one, f"first_linears.{index}") for index, one in enumerate(joined)]).mean(dim=0)
    return linear(leaky(mean), "final_linear")


def draw_inputs(base):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, *base.latent_shape)).astype(np.float32)
    text = rng.standard_normal((2, 5, base.unet.cross_attention_dim)).astype(np.float32)
    t = np.array([10, 700])
    return (z, t, text), (torch.tensor(z).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(text))


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs.detach().numpy()).max() / theirs.detach().abs().max().item()


def test_a_pretrained_checkpoint_becomes_a_domain(reference, tmp_path):
    """U-Net with offsets and encoder output, relative error 1e-4."""
    folder, encoder, offsets = reference
    import_reference.main(import_reference.Config(folder / "pretrained", str(folder / "base"), tmp_path / "domain"))
    domain = load_domain(tmp_path / "domain")
    assert (domain.domain_token, domain.clip_features, domain.scale) == ("creature", "tokens", 0.1)
    (z, t, text), inputs = draw_inputs(domain.base)
    output, features = literal_unet(folder, offsets, inputs)
    unet = effective_unet(Trainable(), domain.frozen)
    ours, seen = jax.jit(lambda p: domain.base.denoise(p, z, jnp.asarray(t), text))(unet)
    assert relative_error(ours, output.permute(0, 2, 3, 1)) < 1e-4
    pictures = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor(((pictures + 1) / 2 - mean) / deviation, dtype=torch.float32).permute(0, 3, 1, 2)
    expected = literal_encoder(encoder, pixels, features)
    phi = domain.base.see(domain.params["image_encoder"], jnp.asarray(pictures), "tokens")
    method = domain.method.encoder
    folded = method.apply({"params": domain.encoder}, phi, method="fold")
    assert relative_error(method.apply({"params": domain.encoder}, folded, seen), expected) < 1e-4


def test_a_tuned_checkpoint_becomes_a_concept(reference, tmp_path):
    """The tuned U-Net with the tuned offsets, relative error 1e-4; and it draws."""
    folder, _, offsets = reference
    picture = tmp_path / "venus.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (16, 16, 3), np.uint8)).save(picture)
    config = import_reference.Config(folder / "tuned", str(folder / "base"), tmp_path / "domain", image=picture)
    import_reference.main(config)
    domain = load_domain(tmp_path / "domain")
    concept = load_concept(tmp_path / "domain" / "venus.safetensors", domain.fingerprint)
    (z, t, text), inputs = draw_inputs(domain.base)
    tuned = torch.load(folder / "tuned" / "unet.pt", weights_only=True)
    output, _ = literal_unet(folder, offsets, inputs, tuned)
    unet = effective_unet(concept.trainable, domain.frozen)
    ours = jax.jit(lambda p: domain.base.denoise(p, z, jnp.asarray(t), text)[0])(unet)
    assert relative_error(ours, output.permute(0, 2, 3, 1)) < 1e-4
    assert domain.generate([concept], ["a photo of *s"], steps=2).shape == (1, 1, 16, 16, 3)


def test_what_a_checkpoint_lacks_is_said(reference, tmp_path):
    folder, encoder, _ = reference
    with pytest.raises(UserError, match=r"tuned is a tuned concept; give the picture .* --image"):
        import_reference.main(import_reference.Config(folder / "tuned", str(folder / "base"), tmp_path / "out"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "pretrained" / "config.json").read_text())
    with pytest.raises(UserError, match=r"encoder.pt does not exist"):
        import_reference.main(import_reference.Config(broken, str(folder / "base"), tmp_path / "out"))
    torch.save({name: tensor for name, tensor in encoder.items() if name != "feature_linear.bias"}, broken / "encoder.pt")
    with pytest.raises(UserError, match=r"encoder.pt lacks the tensor feature_linear.bias"):
        import_reference.main(import_reference.Config(broken, str(folder / "base"), tmp_path / "out"))
