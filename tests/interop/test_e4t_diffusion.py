"""Checkpoints of the public PyTorch implementation, imported: against a restatement in PyTorch from the formulas."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_cache import write_photograph
from PIL import Image, ImageOps
from public_checkpoints import LAYERS, PATCH, WIDTH, write_checkpoints

from e4t_jax import bases
from e4t_jax.bases.image_encoders.bicubic import resize_bicubic
from e4t_jax.cli import import_reference
from e4t_jax.data.images import read_whole
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.files.concept_files import load_concept, save_concept
from e4t_jax.files.domain_files import load_domain
from e4t_jax.interop.e4t_diffusion import import_checkpoint
from e4t_jax.interop.e4t_diffusion.settings import template_of
from e4t_jax.objective import Trainable, effective_unet

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def reference(domain, tmp_path_factory):
    """Checkpoints in the public formats (`public_checkpoints`), on the tiny base beside them: folder, encoder, offsets."""
    folder = tmp_path_factory.mktemp("reference")
    parts = ("vae", "unet", "text_encoder")
    bases.save_folder(folder / "base", domain.base, {part: domain.params[part] for part in parts}, np.float32)
    return folder, *write_checkpoints(folder, domain.base, folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")


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


def literal_pixels(pictures, size):
    """What the public code shows its image encoder: resized (nothing where the size is right), no value clipped, normalised."""
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    resized = torch.tensor(pictures).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(resized, size=(size, size), mode="bicubic", align_corners=True)
    return (
        ((resized.permute(0, 2, 3, 1).double() + 1) / 2 - torch.tensor(mean))
        .div(torch.tensor(deviation))
        .permute(0, 3, 1, 2)
        .float()
    )


def literal_encoder(state, pixels, features, norm_all=False):
    """The public encoder from its description, with PyTorch's own transformer layers; `norm_all` as OpenCLIP from 2.23 on."""
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
    tokens = norm(x, "ln_post") if norm_all else x
    seen = torch.cat([norm(x[:, :1], "ln_post"), tokens[:, 1:][:, 1::2]], dim=1)

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
    return (jnp.asarray(z), t, jnp.asarray(text)), (torch.tensor(z).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(text))


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs.detach().numpy()).max() / theirs.detach().abs().max().item()


@pytest.mark.compiles
def test_a_pretrained_checkpoint_becomes_a_domain(reference, tmp_path):
    """U-Net with offsets and encoder output, relative error 1e-4."""
    folder, encoder, offsets = reference
    import_reference.main(import_reference.Config(str(folder / "pretrained"), tmp_path / "domain", str(folder / "base")))
    domain = load_domain(tmp_path / "domain")
    assert (domain.domain_token, domain.base.image_encoder.features, domain.scale) == ("creature", "bicubic-tokens", 0.1)
    (z, t, text), inputs = draw_inputs(domain.base)
    output, features = literal_unet(folder, offsets, inputs)
    unet = effective_unet(Trainable(), domain.frozen)
    ours, seen = jax.jit(lambda p: domain.base.denoise(p, z, jnp.asarray(t), text))(unet)
    assert relative_error(ours, output.permute(0, 2, 3, 1)) < 1e-4
    for size in (16, 24, 64):  # the tower's own, and others
        pictures = np.random.default_rng(1).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
        expected = literal_encoder(encoder, literal_pixels(pictures, 16), features)
        assert relative_error(encoded(domain, pictures, seen), expected) < 1e-4
    assert domain.regularisation == Domain.regularisation and domain.template == "object"  # its reg_lambda weighs another sum


def encoded(domain, pictures, seen):
    """E of pictures and φ_unet."""
    phi = domain.base.image_encoder.see(domain.params["image_encoder"], jnp.asarray(pictures))
    folded = domain.method.encoder.apply({"params": domain.encoder}, phi, method="fold")
    return domain.method.encoder.apply({"params": domain.encoder}, folded, seen)


@pytest.mark.compiles
def test_a_tuned_checkpoint_becomes_a_concept(reference, tmp_path):
    """The tuned U-Net with the tuned offsets, relative error 1e-4; and it draws."""
    folder, _, offsets = reference
    picture = tmp_path / "venus.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (16, 16, 3), np.uint8)).save(picture)
    config = import_reference.Config(str(folder / "tuned"), tmp_path / "domain", str(folder / "base"), image=picture)
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


@pytest.mark.compiles
def test_an_import_from_python_returns_what_it_wrote(reference, tmp_path):
    """Domain and concept as they are read from the files."""
    folder, _, _ = reference
    picture = tmp_path / "venus.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (16, 16, 3), np.uint8)).save(picture)
    imported = import_checkpoint(folder / "tuned", str(folder / "base"), tmp_path / "domain", image=picture)
    domain = load_domain(imported.folder)
    assert imported.domain.fingerprint == domain.fingerprint and imported.domain.template == domain.template
    concept = load_concept(tmp_path / "domain" / "venus.safetensors", domain.fingerprint)
    assert imported.concept.name == "venus" and imported.concept.scope == concept.scope == "full"
    np.testing.assert_array_equal(imported.concept.folded, concept.folded)
    assert imported.notes == (
        "Read as of OpenCLIP before 2.23, which norms the first token; open_clip chooses the other.",
        "Its reg_lambda 0.01 weighs the sum of ‖e*‖² over a batch, so it is not our λ: tuning takes 0.0016 of ‖s E‖² / ‖e_d‖², "
        "and recipe public 0.1 of that sum.",
    )
    with pytest.raises(UserError, match="open_clip: '3' is unknown; choose one of before-"):
        import_checkpoint(folder / "pretrained", str(folder / "base"), tmp_path / "other", open_clip="3")
    assert not (tmp_path / "other").exists()


def test_what_a_checkpoint_lacks_is_said(reference, tmp_path):
    folder, encoder, _ = reference
    with pytest.raises(UserError, match=r"image: .*tuned is a tuned concept without domain.png; give the picture"):
        import_reference.main(import_reference.Config(str(folder / "tuned"), tmp_path / "out", str(folder / "base")))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "pretrained" / "config.json").read_text())
    with pytest.raises(UserError, match=r"encoder.pt does not exist"):
        import_reference.main(import_reference.Config(str(broken), tmp_path / "out", str(folder / "base")))
    torch.save({name: tensor for name, tensor in encoder.items() if name != "feature_linear.bias"}, broken / "encoder.pt")
    with pytest.raises(UserError, match=r"encoder.pt lacks the tensor feature_linear.bias"):
        import_reference.main(import_reference.Config(str(broken), tmp_path / "out", str(folder / "base")))


@pytest.mark.parametrize("size", [64, 512, 224, 225, 1])
def test_pictures_are_resized_as_pytorch_resizes_them_to_1e_5(size):
    """Bicubic with aligned corners, no antialiasing, nothing clipped; relative to the largest entry."""
    pictures = np.random.default_rng(size).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(pictures).permute(0, 3, 1, 2), size=(224, 224), mode="bicubic", align_corners=True
    ).permute(0, 2, 3, 1)
    assert size == 1 or size == 224 or theirs.abs().max() > 1.2
    assert relative_error(resize_bicubic(jnp.asarray(pictures), 224), theirs) < 1e-5


def literal_whole_pixels(path, size):
    """What the public inference shows its image encoder of a file: all of the picture, turned as EXIF says, squashed."""
    with Image.open(path) as opened:
        picture = np.array(ImageOps.exif_transpose(opened).convert("RGB")).astype(np.float32) / 255
    return literal_pixels((2 * picture - 1)[None], size)


@pytest.mark.compiles
@pytest.mark.parametrize(("width", "height", "turned"), [(160, 90, False), (48, 64, False), (64, 48, True), (16, 16, False)])
def test_an_imported_domain_sees_whole_pictures_as_the_public_inference_does(reference, tmp_path, width, height, turned):
    """E of a JPEG of any shape, through tuning and the concept's file, against the whole restated in PyTorch: relative error 1e-4.
    Cropped first, as in other domains, it is more than 0.5 % off unless the picture is square."""
    folder, encoder, _ = reference
    domain = import_checkpoint(folder / "pretrained", str(folder / "base"), tmp_path / "domain").domain
    picture = write_photograph(tmp_path / "me.jpg", width, height)
    if turned:
        exif = Image.Exif()
        exif[274] = 6
        Image.open(picture).save(picture, exif=exif, quality=90)
    features = np.random.default_rng(0).standard_normal((1, domain.base.feature_width)).astype(np.float32)
    expected = literal_encoder(encoder, literal_whole_pixels(picture, 16), torch.tensor(features))

    def error(own):
        save_concept(tmp_path / "me.safetensors", own.tune([picture], steps=0)[0], np.float32)
        folded = load_concept(tmp_path / "me.safetensors").folded
        return relative_error(own.method.encoder.apply({"params": own.encoder}, folded[None], features), expected)

    assert error(domain) < 1e-4
    cropped = dataclasses.replace(domain, clip_squash=None)
    assert (error(cropped) > 5e-3) == (width != height)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (301, 777), (9, 12), (224, 224), (3000, 40)])
def test_a_whole_picture_is_squashed_as_pytorch_does_to_1e_5(tmp_path, width, height):
    """Largest difference over the largest entry; of its rows and columns only those are touched that count."""
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(2 * (pixels.astype(np.float32) / 255) - 1).permute(2, 0, 1)[None],
        size=(224, 224),
        mode="bicubic",
        align_corners=True,
    )
    assert relative_error(read_whole(pixels, 224), theirs[0].permute(1, 2, 0)) < 1e-5


@pytest.mark.compiles
def test_other_kinds_see_pictures_as_before(domain):
    """Only imported domains see bicubic pictures; at the tower's own size all kinds of tokens are the same."""
    weights = domain.params["image_encoder"]
    plain, bicubic = (domain.base.with_features(name).image_encoder for name in ("tokens", "bicubic-tokens"))
    pictures = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)
    own = pictures[:, :16, :16]
    np.testing.assert_array_equal(plain.see(weights, own), bicubic.see(weights, own))
    antialiased = jnp.clip(jax.image.resize(pictures, (2, 16, 16, 3), "cubic", antialias=True), -1, 1)
    np.testing.assert_allclose(plain.see(weights, pictures), plain.see(weights, antialiased), atol=1e-5)
    assert np.abs(plain.see(weights, pictures) - bicubic.see(weights, pictures)).max() > 1e-2
    with pytest.raises(UserError, match="clip_features: 'words' is unknown; choose one of layers, tokens"):
        domain.base.with_features("words").image_encoder  # noqa: B018


@pytest.mark.compiles
def test_newer_open_clip_norms_all_tokens(reference, tmp_path, capsys):
    folder, encoder, _ = reference
    own = (str(folder / "pretrained"), tmp_path / "domain", str(folder / "base"))
    import_reference.main(import_reference.Config(*own, open_clip="2.23-or-later"))
    assert "OpenCLIP 2.23 or later, which norms all tokens" in capsys.readouterr().out
    domain = load_domain(tmp_path / "domain")
    features = np.random.default_rng(0).standard_normal((2, domain.base.feature_width)).astype(np.float32)
    pictures = np.random.default_rng(1).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    for norm_all, close in ((True, True), (False, False)):
        expected = literal_encoder(encoder, literal_pixels(pictures, 16), torch.tensor(features), norm_all)
        assert (relative_error(encoded(domain, pictures, jnp.asarray(features)), expected) < 1e-4) == close


def copy_of(reference, tmp_path, **settings):
    """The pretrained checkpoint with other settings; those of value `...` left out."""
    folder, _, _ = reference
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("weight_offsets.pt", "encoder.pt"):
        (changed / name).symlink_to(folder / "pretrained" / name)
    content = {**json.loads((folder / "pretrained" / "config.json").read_text()), **settings}
    (changed / "config.json").write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    return changed


def import_from(changed, reference, tmp_path, **options):
    import_reference.main(import_reference.Config(str(changed), tmp_path / "domain", str(reference[0] / "base"), **options))
    return load_domain(tmp_path / "domain")


@pytest.mark.compiles
def test_settings_are_carried_and_the_nested_ones_win(reference, tmp_path, capsys):
    """Inference of the public code reads a tuned checkpoint's nested settings: scale and prompts come from there; the λ there, of
    another sum, is said and not taken."""
    nested = json.loads((reference[0] / "pretrained" / "config.json").read_text())
    nested |= {"domain_embed_scale": 0.3, "reg_lambda": 0.02, "prompt_template": "art"}
    own = {"domain_embed_scale": 0.7, "reg_lambda": 0.5, "prompt_template": None, "pretrained_args": nested}
    changed = copy_of(reference, tmp_path, **own)
    (changed / "unet.pt").symlink_to(reference[0] / "tuned" / "unet.pt")
    picture = tmp_path / "venus.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (16, 16, 3), np.uint8)).save(picture)
    domain = import_from(changed, reference, tmp_path, image=picture)
    assert (domain.scale, domain.regularisation, domain.template) == (0.3, Domain.regularisation, "art")
    said = capsys.readouterr().out
    assert "none of ours" not in said and "Its reg_lambda 0.02 weighs the sum of ‖e*‖² over a batch" in said


@pytest.mark.parametrize(
    ("template", "token", "kind", "held"),
    [
        ("normal", "face", "object", True),
        ("face", "cat", "face", True),
        ("art", "cat", "art", True),
        (None, "face", "face", True),
        (None, "cat", "object", True),
        ("a photo of {placeholder_token}", "cat", "object", True),
        ("a painting in the style of {placeholder_token}", "cat", "art", True),
        ("a picture of {placeholder_token}", "cat", "neutral", True),
        ("the style of {placeholder_token}, oil", "cat", "art", False),
        ("my {placeholder_token}", "face", "face", False),
    ],
)
def test_prompts_become_the_nearest_kind(template, token, kind, held):
    from e4t_jax.templates import templates

    assert template_of(template, token) == (kind, held)
    if held and template and "{" in template:
        assert template.replace("{placeholder_token}", "*s") in templates(kind)


@pytest.mark.compiles
def test_a_prompt_that_is_none_of_ours_is_said(reference, tmp_path, capsys):
    changed = copy_of(reference, tmp_path, prompt_template="my {placeholder_token}", reg_lambda=...)
    import_from(changed, reference, tmp_path)
    said = capsys.readouterr().out
    assert "Its prompt 'my {placeholder_token}' is none of ours; the captions of kind 'object'" in said
    assert "Its reg_lambda 0.01 weighs" in said  # the public code's default


@pytest.mark.parametrize(
    ("name", "value"), [("reg_lambda", "0.1"), ("domain_embed_scale", float("nan")), ("domain_embed_scale", 0)]
)
def test_a_number_out_of_range_is_one_line_and_nothing_is_written(reference, tmp_path, name, value):
    with pytest.raises(UserError, match=rf"changed/config.json: {name} = "):
        import_from(copy_of(reference, tmp_path, **{name: value}), reference, tmp_path)
    assert not (tmp_path / "domain").exists()


@pytest.mark.compiles
def test_a_text_encoder_beside_a_checkpoint_is_the_bases_or_refused(reference, domain, tmp_path):
    """The base's own passes, with the word that the public code adds; another is named, and nothing is written."""
    from safetensors.torch import load_file

    changed = copy_of(reference, tmp_path)
    state = load_file(reference[0] / "base" / "text_encoder" / "model.safetensors")
    words = "text_model.embeddings.token_embedding.weight"
    state = {name: tensor for name, tensor in state.items() if name != "text_projection.weight"}
    state[words] = torch.cat([state[words], torch.ones(1, state[words].shape[1])])
    state = {name: tensor.half() for name, tensor in state.items()}
    state["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save(state, changed / "text_encoder.pt")
    import_from(changed, reference, tmp_path)
    other = dict(state)
    other["text_model.final_layer_norm.bias"] = other["text_model.final_layer_norm.bias"] + 0.1
    torch.save({"state_dict": other}, changed / "text_encoder.pt")
    options = (str(changed), tmp_path / "other", str(reference[0] / "base"))
    with pytest.raises(UserError, match=r"base: \S+text_encoder.pt is another text encoder .*final_layer_norm.bias differs"):
        import_reference.main(import_reference.Config(*options))
    assert not (tmp_path / "other").exists()


@pytest.mark.compiles
def test_a_wrapped_checkpoint_is_unwrapped(reference, tmp_path):
    changed = copy_of(reference, tmp_path)
    plain = import_from(changed, reference, tmp_path)
    for name in ("weight_offsets.pt", "encoder.pt"):
        content = torch.load(changed / name, weights_only=True)
        (changed / name).unlink()
        torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in content.items()}, "global_step": 7}, changed / name)
    again = import_from(changed, reference, tmp_path)
    assert again.fingerprint == plain.fingerprint
