"""Newer checkpoints of the public PyTorch implementation, without image encoder and U-Net; and what no import may write."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from public_checkpoints import HAS_TORCH, WIDTH, write_checkpoints

from e4t_jax import bases
from e4t_jax.cli import import_reference
from e4t_jax.errors import UserError
from e4t_jax.files.concept_files import load_concept
from e4t_jax.files.domain_files import load_domain
from e4t_jax.interop.e4t_diffusion.tensors import read_image_encoder
from e4t_jax.objective import effective_unet

pytestmark = pytest.mark.skipif(not HAS_TORCH, reason="the formats are PyTorch's")


@pytest.fixture(scope="module")
def public(domain, tmp_path_factory):
    """The checkpoints, a base without image encoder, the older format's domain, and a picture."""
    folder = tmp_path_factory.mktemp("public")
    parts = ("vae", "unet", "text_encoder")
    bases.save_folder(folder / "base", domain.base, {part: domain.params[part] for part in parts}, np.float32)
    write_checkpoints(folder, domain.base, folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    import_reference.main(import_reference.Config(str(folder / "pretrained"), folder / "domain", str(folder / "base")))
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (16, 16, 3), np.uint8)).save(folder / "venus.png")
    return folder


def import_to(public, out, name, **options):
    import_reference.main(import_reference.Config(str(public / name), out, str(public / "base"), **options))
    return load_domain(out)


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.compiles
def test_a_newer_checkpoint_is_the_same_domain_with_the_image_encoder_given(public, tmp_path, monkeypatch):
    """By a relative path, too, and used from elsewhere."""
    monkeypatch.chdir(public)
    import_to(public, tmp_path / "out", "newer-pretrained", image_encoder="domain/image_encoder")
    monkeypatch.chdir(tmp_path)
    ours, older = load_domain("out"), load_domain(public / "domain")
    assert ours.fingerprint == older.fingerprint and ours.base == older.base
    equal(ours.params, older.params)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "domain.json",
        "encoder.safetensors",
        "networks.safetensors",
        "offsets.safetensors",
    ]


@pytest.mark.compiles
def test_of_a_newer_tuned_checkpoint_the_offsets_are_the_concepts(public, tmp_path):
    """It trains no U-Net: the base's, with these offsets, is what it draws with."""
    options = {"image": public / "venus.png", "image_encoder": str(public / "domain" / "image_encoder")}
    domain = import_to(public, tmp_path / "out", "newer-tuned", **options)
    concept = load_concept(tmp_path / "out" / "venus.safetensors", domain.fingerprint)
    assert concept.scope == "head" and concept.trainable.unet is None and not domain.factors
    older = load_domain(public / "domain")
    equal(effective_unet(concept.trainable, domain.frozen), effective_unet(concept.trainable._replace(factors=None), older.frozen))


@pytest.mark.compiles
def test_what_a_newer_checkpoint_does_not_hold_is_asked_for(public, tmp_path):
    """Nothing is written: no image encoder to be had, one of another width, one too many, a base of other offsets."""
    for name, options, said in (
        ("newer-pretrained", {}, r"image_encoder: laion/CLIP-ViT-H-14-laion2B-s32B-b79K: .*could not be fetched .*give a folder"),
        ("pretrained", {"image_encoder": "x/y"}, r"image_encoder: \S+encoder.pt contains one; leave it out"),
        ("newer-tuned", {}, r"image: .*newer-tuned is a tuned concept without domain.png; give the picture"),
    ):
        with pytest.raises(UserError, match=said):
            import_to(public, tmp_path / "new" / "out", name, **options)
    narrow = tmp_path / "narrow"
    shutil.copytree(public / "newer-pretrained", narrow)
    import torch

    state = torch.load(narrow / "encoder.pt", weights_only=True)
    torch.save({name: one for name, one in state.items() if name != "first_linears.0.weight"}, narrow / "encoder.pt")
    with pytest.raises(UserError, match=r"encoder.pt lacks the tensor first_linears.\d+.weight"):
        import_to(tmp_path, tmp_path / "new" / "out", "narrow")
    offsets = torch.load(narrow / "weight_offsets.pt", weights_only=True)
    owner = next(iter(offsets)).rpartition(".wo_")[0]
    torch.save(state, narrow / "encoder.pt")
    torch.save({name: one for name, one in offsets.items() if not name.startswith(owner)}, narrow / "weight_offsets.pt")
    config = import_reference.Config(
        str(narrow), tmp_path / "new" / "out", str(public / "base"), image_encoder=str(public / "domain" / "image_encoder")
    )
    with pytest.raises(UserError, match=r"base: the offsets of \S+narrow do not fit \S+base; give the base it was trained on"):
        import_reference.main(config)
    torch.save({name: one * np.nan for name, one in offsets.items()}, narrow / "weight_offsets.pt")
    with pytest.raises(UserError, match=r"weight_offsets.pt: \S+ holds numbers that are not finite"):
        import_reference.main(config)
    assert not (tmp_path / "new").exists()


@pytest.mark.compiles
def test_an_import_is_written_whole_or_not_at_all(public, tmp_path):
    """Over an older domain, whose image encoder it would replace; and never over the domain's own files."""
    out = tmp_path / "out"
    shutil.copytree(public / "domain", out)
    picture = tmp_path / "encoder.png"
    shutil.copy(public / "venus.png", picture)
    before = content_of(out)
    with pytest.raises(UserError, match=r"encoder.safetensors is a file of the domain itself; .*another name"):
        import_to(public, out, "tuned", image=picture)
    assert content_of(out) == before
    (out / "offsets.safetensors").unlink()
    (out / "offsets.safetensors").mkdir()
    before = content_of(out)
    with pytest.raises(UserError, match=r"Cannot write \S+offsets.safetensors: it is a folder"):
        import_to(public, out, "pretrained", open_clip="2.23-or-later")
    assert content_of(out) == before


def test_only_towers_that_openai_trained_have_its_activation():
    """The public code names OpenAI's where nothing is said, and takes OpenCLIP's ViT-H/14: none of OpenAI's is so wide."""

    def facts(width, name):
        ones = {"conv1.weight": (width, 3, 4, 4), "class_embedding": (width,), "positional_embedding": (17, width)}
        ones |= {f"ln_{which}.{leaf}": (width,) for which in ("pre", "post") for leaf in ("weight", "bias")}
        ones["transformer.resblocks.0.mlp.c_fc.bias"] = (2 * width,)
        state = {f"clip_vision.{key}": np.ones(shape, np.float32) for key, shape in ones.items()}
        return read_image_encoder(state, "encoder.pt", name)[0]["hidden_act"]

    assert facts(WIDTH, "ViT-H-14::laion2b_s32b_b79k") == "gelu"
    assert facts(1024, "ViT-L-14::openai") == facts(1024, "openai/clip-vit-large-patch14") == "quick_gelu"
    assert facts(1280, "openai/clip-vit-large-patch14") == "gelu"


@pytest.mark.parametrize("name", ["domain_class_token", "domain_embed_scale", "prompt_template"])
def test_settings_that_are_no_settings_are_one_line(public, tmp_path, name):
    changed = tmp_path / "changed"
    shutil.copytree(public / "newer-pretrained", changed)
    settings = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**settings, name: ["x"]}))
    with pytest.raises(UserError, match=rf"changed/config.json\b.*{name}"):
        import_to(tmp_path, tmp_path / "new", "changed")
    assert not (tmp_path / "new").exists()
