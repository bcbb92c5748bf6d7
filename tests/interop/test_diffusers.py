"""What is exported loads in diffusers' own PyTorch pipelines and draws there what it draws here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax import bases
from e4t_jax.cli import export
from e4t_jax.concept import Concept
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.files.concept_files import save_concept
from e4t_jax.files.domain_files import load_domain, save_domain
from e4t_jax.interop.diffusers import constant_word, export_concept, merged_base
from e4t_jax.interop.lora import kohya_name, lora
from e4t_jax.objective import Trainable, effective_unet
from e4t_jax.sample import draw_prompt_noise

torch = pytest.importorskip("torch")
STEPS = 5


def starting_noise(domain, prompts, seed=0):
    """The noise of `Domain.generate`, in PyTorch's layout."""
    noise = draw_prompt_noise(seed, prompts, domain.base.latent_shape).start
    return torch.tensor(np.asarray(noise)).permute(0, 3, 1, 2)


def draw_in_pytorch(pipeline, prompts, noise, guidance):
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(prompts, latents=noise, num_inference_steps=STEPS, guidance_scale=guidance, output_type="np").images
    return np.round(drawn * 255).astype(int)


@pytest.mark.compiles
@pytest.mark.parametrize(("scheduler", "sampling"), [("DDIMScheduler", "ddim"), ("DPMSolverMultistepScheduler", "dpm++2m")])
def test_text_to_image_matches_pytorch(domain, tmp_path, scheduler, sampling):
    """The whole pipeline from the same noise: every pixel within 2 of 255."""
    import diffusers

    configs = {**domain.base.configs, "scheduler": {**domain.base.scheduler, "_class_name": scheduler}}
    text = {**configs["text_encoder"], "architectures": ["CLIPTextModel"]}
    base = bases.StableDiffusion({**configs, "text_encoder": text}, domain.base.tokenizer)
    text_encoder = {"text_model": domain.params["text_encoder"]["text_model"]}
    kept = {"vae": domain.params["vae"], "unet": domain.params["unet"], "text_encoder": text_encoder}
    bases.save_folder(tmp_path, base, kept, np.float32)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline.scheduler).__name__ == scheduler
    prompts = ["a photo of a red *s", "*s in the snow"]
    spoken = [prompt.replace("*s", "creature") for prompt in prompts]
    theirs = draw_in_pytorch(pipeline, spoken, starting_noise(domain, prompts), 3.0)
    whole = dataclasses.replace(domain, base=base)
    assert np.abs(whole.generate_class(1, prompts, steps=STEPS, guidance=3.0)[0].astype(int) - theirs).max() <= 2
    other = whole.generate_class(1, prompts, steps=STEPS, guidance=3.0, sampling=sampling)[0]
    assert np.abs(other.astype(int) - theirs).max() <= 2
    assert np.ptp(theirs) > 20


def with_constant_word(domain, concept, word):
    """A domain whose encoder is silent, and the concept whose residual says `word` at every step."""
    encoder = {**domain.encoder, "final": jax.tree.map(jnp.zeros_like, domain.encoder["final"])}
    own = domain.base.look_up(domain.params["text_encoder"], domain.method.domain_id)
    residual = (jnp.asarray(word) - own) / domain.scale
    silent = dataclasses.replace(domain, encoder=encoder)
    return silent, concept._replace(domain=silent.fingerprint, trainable=concept.trainable._replace(residual=residual))


@pytest.mark.compiles
def test_an_exported_model_draws_the_same_in_pytorch(domain, concept, tmp_path):
    """`*s` simply works in a prompt: every pixel within 2 of 255 of ours with the same constant word."""
    import diffusers

    word = constant_word(domain, concept, steps=STEPS)
    bases.save_folder(tmp_path, *merged_base(domain, concept, word), np.float32)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    prompts = ["a photo of *s in the snow", "*s"]
    theirs = draw_in_pytorch(pipeline, prompts, starting_noise(domain, prompts), 3.0)
    constant, said = with_constant_word(domain, concept, word)
    ours = constant.generate([said], prompts, steps=STEPS, guidance=3.0)[0].astype(int)
    assert np.abs(ours - theirs).max() <= 2
    plain = draw_in_pytorch(
        pipeline, [prompt.replace("*s", "creature") for prompt in prompts], starting_noise(domain, prompts), 3.0
    )
    assert np.abs(plain - theirs).max() > 2


@pytest.mark.compiles
def test_a_lora_of_full_rank_is_the_merged_model(domain, concept, tmp_path):
    """Loaded by `load_lora_weights`: the U-Net's output within a relative 1e-3 of the merged weights' own."""
    pytest.importorskip("peft")
    import diffusers
    from safetensors.numpy import save_file

    bases.save_folder(tmp_path / "base", *merged_base(domain, concept._replace(trainable=Trainable()), np.zeros(16)), np.float32)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    pipeline.unet.load_state_dict(
        diffusers.UNet2DConditionModel.from_pretrained(save_unet(domain, tmp_path), local_files_only=True).state_dict()
    )
    update = lora(domain, concept, rank=64)
    assert update.error < 1e-6
    save_file(update.tensors, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, *domain.base.latent_shape)).astype(np.float32)
    text = rng.standard_normal((2, 5, domain.base.unet.cross_attention_dim)).astype(np.float32)
    t = np.array([10, 700])
    with torch.no_grad():
        theirs = pipeline.unet(torch.tensor(z).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(text)).sample
    merged = effective_unet(concept.trainable, domain.frozen)
    inputs = jnp.asarray(z), jnp.asarray(t), jnp.asarray(text)
    ours = np.asarray(jax.jit(lambda p: domain.base.denoise(p, *inputs)[0])(merged))
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()


def save_unet(domain, folder):
    """The base's own U-Net, without any offsets, as a folder."""
    bases.save_part(folder / "plain", "unet", domain.params["unet"], np.float32)
    config = {"_class_name": "UNet2DConditionModel", **domain.base.configs["unet"]}
    bases.write_json(folder / "plain" / "unet" / "config.json", config)
    return folder / "plain" / "unet"


def test_a_higher_rank_misses_less(domain, concept):
    errors = [lora(domain, concept, rank).error for rank in (1, 4, 16)]
    assert 1 > errors[0] > errors[1] > errors[2]
    with pytest.raises(UserError, match="rank: 0 is out of range; give 1 or more"):
        lora(domain, concept, 0)
    with pytest.raises(UserError, match="error: 2 is out of range; give 0 or more and at most 1"):
        lora(domain, concept, error=2)
    with pytest.raises(UserError, match=r"format: .* changes no weights"):
        lora(dataclasses.replace(domain, factors={}), concept._replace(trainable=Trainable()))
    with pytest.raises(UserError, match="scope full"):
        lora(domain, concept._replace(trainable=Trainable(unet=domain.params["unet"])), 4)


def test_the_rank_is_the_smallest_that_misses_no_more_than_asked(domain, concept):
    """The stated error is the tensors' own; one rank less misses more; where nothing may be missed, the full rank and no more."""
    kernels = domain.base.offset_kernels(domain.params["unet"])
    for most in (0.5, 0.05):
        update = lora(domain, concept, error=most)
        assert update.error <= most < lora(domain, concept, update.rank - 1).error
        assert missed(domain, concept, update) == pytest.approx(update.error, rel=1e-3)
    assert lora(domain, concept).error <= 0.05
    side = max(min(kernel.shape) for kernel in kernels.values())
    whole = lora(domain, concept, 1_000_000)
    assert whole.rank == side == lora(domain, concept, error=0).rank and whole.error == 0
    assert max(tensor.size for tensor in whole.tensors.values()) <= max(kernel.size for kernel in kernels.values())


def missed(domain, concept, update):
    """The relative error of an update's own products, over all kernels."""
    unet = effective_unet(concept.trainable, domain.frozen)
    left = total = 0.0
    for path, kernel in domain.base.offset_kernels(domain.params["unet"]).items():
        change = np.asarray(domain.base.offset_kernels(unet)[path] - kernel).T
        up, down = (update.tensors[f"{kohya_name(path)}.lora_{side}.weight"] for side in ("up", "down"))
        left += np.square(change - up @ down).sum()
        total += np.square(change).sum()
    return (left / total) ** 0.5


def test_the_constant_word_is_the_mean_of_the_words_said(domain, concept):
    """Near every word of the walk, and not the domain's own."""
    word = constant_word(domain, concept, steps=STEPS)
    own = np.asarray(domain.base.look_up(domain.params["text_encoder"], domain.method.domain_id))
    assert word.shape == own.shape and np.abs(word - own).max() > 1e-2


@pytest.mark.compiles
def test_the_command_line_writes_all_three_formats(domain, concept, tmp_path):
    import diffusers

    bases.save_folder(tmp_path / "base", domain.base, domain.params)
    base, params = bases.load_folder(tmp_path / "base")
    save_domain(tmp_path / "domain", Domain(str(tmp_path / "base"), "creature", base, params, domain.encoder, domain.factors))
    again = load_domain(tmp_path / "domain")
    save_concept(tmp_path / "venus.safetensors", concept._replace(domain=again.fingerprint))
    for form in ("diffusers", "lora", "embedding"):
        common = {"format": form, "domain": str(tmp_path / "domain")}
        export.main(export.Config(tmp_path / "venus.safetensors", tmp_path / form, **common))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "diffusers")
    assert "*s" in pipeline.tokenizer.get_vocab()
    # The same in upper case, as here.
    upper, lower = (pipeline.tokenizer.convert_tokens_to_ids(token) for token in ("*S", "*s"))
    table = pipeline.text_encoder.get_input_embeddings().weight
    # Either may stand for both: newer tokenizers fold their case, and their embeddings are the same.
    assert upper != lower and pipeline.tokenizer("a *S").input_ids[2] in (upper, lower) and (table[upper] == table[lower]).all()
    assert json.loads((tmp_path / "diffusers" / "model_index.json").read_text())["text_encoder"][1] == "CLIPTextModel"

    plain = Concept("plain", "compact", again.fingerprint, Trainable(), concept.folded)
    base_only = {part: params[part] for part in ("vae", "unet")}
    text = {"text_model": params["text_encoder"]["text_model"]}
    configs = {**base.configs, "text_encoder": {**base.configs["text_encoder"], "architectures": ["CLIPTextModel"]}}
    bases.save_folder(tmp_path / "plain", bases.StableDiffusion(configs, base.tokenizer), {**base_only, "text_encoder": text})
    assert plain.name == "plain"
    other = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "plain")
    other.load_textual_inversion(tmp_path / "embedding")
    table = other.text_encoder.get_input_embeddings().weight
    learned = table[other.tokenizer.convert_tokens_to_ids("*s")].detach().numpy()
    merged = pipeline.text_encoder.get_input_embeddings().weight
    np.testing.assert_allclose(learned, merged[pipeline.tokenizer.convert_tokens_to_ids("*s")].detach().numpy(), atol=1e-6)


def exporting(saved, out, **options):
    return export.Config(saved / "venus.safetensors", out, domain=str(saved / "domain"), **options)


@pytest.mark.compiles
def test_exports_of_several_names_fit_into_one_pipeline_on_the_base_itself(saved, tmp_path):
    """The base as `save_folder` wrote it, projection and all, takes two embeddings and a LoRA, and draws."""
    pytest.importorskip("peft")
    import diffusers

    for name in ("<venus>", "<ada>"):
        export.main(exporting(saved, tmp_path / name, format="embedding", token=name))
    export.main(exporting(saved, tmp_path / "lora", format="lora"))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(saved / "base")
    pipeline.load_textual_inversion(tmp_path / "<venus>")
    pipeline.load_textual_inversion(tmp_path / "<ada>")
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    assert len({pipeline.tokenizer.convert_tokens_to_ids(name) for name in ("<venus>", "<ada>")}) == 2
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("<venus> beside <ada>", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.compiles
@pytest.mark.parametrize("token", ["", "two words", "creature", "<|endoftext|>", "a\t"])
@pytest.mark.parametrize("form", ["embedding", "diffusers"])
def test_a_name_that_cannot_be_told_apart_is_refused(saved, tmp_path, token, form):
    with pytest.raises(UserError, match=r"^token: [^\n]+$"):
        export.main(exporting(saved, tmp_path / "out", format=form, token=token))
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.compiles
@pytest.mark.parametrize("form", ["embedding", "lora", "diffusers"])
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(saved, tmp_path, monkeypatch, form):
    """Where the file system says so, in the midst of writing."""
    import os

    written = []
    sync = os.fsync

    def full(handle):
        written.append(handle)
        if form != "diffusers" or len(written) == 4:
            raise OSError(28, "No space left on device")
        return sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"^Cannot write {tmp_path}/out/[^.][^\n]*: No space left on device[^\n]*$"):
        export.main(exporting(saved, tmp_path / "out", format=form))
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def other_base(base):
    """A base that does what `base` does, and is none of Stable Diffusion's."""
    return type("OtherBase", (), {name: getattr(base, name) for name in dir(bases.Base) if not name.startswith("_")})()


@pytest.mark.parametrize("form", ["embedding", "lora", "diffusers"])
def test_what_no_pipeline_takes_is_one_line(domain, concept, tmp_path, form):
    """A base of another architecture, a concept of another domain, an unknown precision; nothing is written."""
    other = dataclasses.replace(domain, base=other_base(domain.base))
    with pytest.raises(UserError, match="domain: creatures is a OtherBase; only concepts on Stable Diffusion can be exported"):
        export_concept(other, concept, tmp_path / "out", format=form)
    with pytest.raises(UserError, match="venus was tuned in another domain or on another base"):
        export_concept(domain, concept._replace(domain="0" * 16), tmp_path / "out", format=form)
    with pytest.raises(UserError, match="dtype: 'float8' is unknown; choose one of float16, float32"):
        export_concept(domain, concept, tmp_path / "out", format=form, dtype="float8")
    with pytest.raises(UserError, match="format: 'onnx' is unknown; choose one of diffusers, lora, embedding"):
        export_concept(domain, concept, tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.compiles
def test_an_export_from_python_tells_what_it_wrote(domain, concept, tmp_path):
    from safetensors.numpy import load_file

    exported = export_concept(domain, concept, tmp_path / "lora", format="lora", rank=2, dtype="float32")
    update = lora(domain, concept, 2)
    files = ("pytorch_lora_weights.safetensors", "venus.safetensors", "learned_embeds.safetensors")
    assert exported == (tmp_path / "lora", "*s", files, 2, update.error)
    assert {path.name for path in exported.folder.iterdir()} == {*files, "README.md"}
    np.testing.assert_equal(load_file(exported.folder / files[0]), update.tensors)
    assert export_concept(domain, concept, tmp_path / "word", format="embedding", token="<venus>").token == "<venus>"
    assert set(load_file(tmp_path / "word" / "learned_embeds.safetensors")) == {"<venus>"}


@pytest.mark.compiles
def test_a_folder_that_cannot_be_written_is_one_line(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^out: Cannot write [^\n]*file/out: [^\n]+$"):
        export.main(exporting(saved, tmp_path / "file" / "out"))


@pytest.mark.compiles
def test_the_error_that_is_left_is_said(saved, tmp_path, capsys):
    export.main(exporting(saved, tmp_path / "out", format="lora", error=0.5))
    said = capsys.readouterr().out
    assert "pytorch_lora_weights.safetensors, venus.safetensors, learned_embeds.safetensors and README.md" in said
    rank = int(said.split("rank ")[1].split(":")[0])
    assert rank < 16 and 0 < float(said.split("misses ")[1].split("%")[0]) <= 50
