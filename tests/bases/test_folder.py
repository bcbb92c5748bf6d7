"""Every file format that weights come in is read into the same tree, and what is wrong with one is said in one line."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from base_folder import assert_one_line, change
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from e4t_jax import bases
from e4t_jax.bases.load import open_base
from e4t_jax.bases.stable_diffusion import geometries
from e4t_jax.bases.stable_diffusion.names import to_torch
from e4t_jax.bases.tokenizers import tokenizer_of_words
from e4t_jax.errors import UserError
from e4t_jax.storage import fingerprint
from e4t_jax.templates import known_words


def tensors_of(params, part, dtype):
    flat = flatten_dict(params[part], sep="/")
    return {bases.torch_name(part, path): to_torch(path, np.asarray(leaf)).astype(dtype) for path, leaf in flat.items()}


def write_sharded(folder, tensors, name="diffusion_pytorch_model", variant=""):
    names = sorted(tensors)
    shards = {f"{name}-0000{i + 1}-of-00002{variant}.safetensors": names[i::2] for i in range(2)}
    for file, own in shards.items():
        save_file({key: tensors[key] for key in own}, folder / file)
    index = {"weight_map": {key: file for file, own in shards.items() for key in own}}
    (folder / f"{name}.safetensors.index{variant}.json").write_text(json.dumps(index))


def write_torch(folder, tensors, dtype="float32"):
    torch = pytest.importorskip("torch")
    kept = {key: torch.tensor(value).to(getattr(torch, dtype)) for key, value in tensors.items()}
    torch.save(kept, folder / "diffusion_pytorch_model.bin")


def write_bfloat16(folder, tensors):
    import ml_dtypes

    save_file(
        {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}, folder / "diffusion_pytorch_model.safetensors"
    )


FORMATS = {
    "safetensors": (0, lambda folder, tensors: save_file(tensors, folder / "diffusion_pytorch_model.safetensors")),
    "safetensors fp16": (
        1e-3,
        lambda folder, tensors: save_file(
            {key: value.astype(np.float16) for key, value in tensors.items()},
            folder / "diffusion_pytorch_model.fp16.safetensors",
        ),
    ),
    "safetensors bfloat16": (1e-2, write_bfloat16),
    "sharded": (0, write_sharded),
    "sharded fp16": (0, lambda folder, tensors: write_sharded(folder, tensors, variant=".fp16")),
    "bin": (0, write_torch),
    "bin bfloat16": (1e-2, lambda folder, tensors: write_torch(folder, tensors, "bfloat16")),
}


@pytest.mark.compiles
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_weights(base_and_params, tmp_path, form):
    """Exact, or to the relative rounding of half precision."""
    base, params = base_and_params
    tolerance, write = FORMATS[form]
    write(tmp_path, tensors_of(params, "unet", np.float32))
    loaded = bases.load_part(tmp_path, "unet", base.param_shapes()["unet"])
    for before, after in zip(jax.tree.leaves(params["unet"]), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_allclose(after, before, rtol=tolerance, atol=1e-6 if tolerance else 0)


def test_weights_of_flax_keep_their_names_and_layouts(base_and_params, tmp_path):
    base, params = base_and_params
    (tmp_path / "diffusion_flax_model.msgpack").write_bytes(msgpack_serialize(jax.tree.map(np.asarray, params["unet"])))
    loaded = bases.load_part(tmp_path, "unet", base.param_shapes()["unet"])
    jax.tree.map(np.testing.assert_array_equal, loaded, params["unet"])


def test_older_names_of_the_vae_are_known(base_and_params, tmp_path):
    """Stable Diffusion's own VAE files say query, key, value and proj_attn."""
    base, params = base_and_params
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = tensors_of(params, "vae", np.float32)
    for new, old in older.items():
        tensors = {key.replace(f".{new}.", f".{old}."): value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = bases.load_part(tmp_path, "vae", base.param_shapes()["vae"])
    jax.tree.map(np.testing.assert_array_equal, loaded, params["vae"])


@pytest.mark.parametrize(("part", "tower"), [("text_encoder", "text_model."), ("image_encoder", "vision_model.")])
def test_a_tower_that_transformers_5_wrote_alone_is_known(base_and_params, tmp_path, part, tower):
    """Its names begin without the tower's own."""
    base, params = base_and_params
    tensors = {name.removeprefix(tower): value for name, value in tensors_of(params, part, np.float32).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, bases.load_part(tmp_path, part, base.param_shapes()[part]), params[part])


@pytest.mark.compiles
def test_a_whole_clip_model_serves_as_image_encoder(base_and_params, tmp_path):
    """CLIP's repositories hold both halves in one file, the configurations nested."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    base, params = base_and_params
    bases.save_folder(tmp_path / "base", base, {part: params[part] for part in ("vae", "unet", "text_encoder")})
    ours = base.configs["image_encoder"]
    vision = {name: value for name, value in ours.items() if name not in ("architectures", "projection_dim")}
    config = transformers.CLIPConfig(vision_config=vision, text_config=base.configs["text_encoder"], projection_dim=8)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    loaded, weights = bases.load_folder(tmp_path / "base", image_encoder=tmp_path / "clip")
    pictures = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    import torch

    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor(((pictures + 1) / 2 - mean) / deviation, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = model.visual_projection(model.vision_model(pixels).pooler_output).numpy()
    np.testing.assert_allclose(
        loaded.image_encoder.embed(weights["image_encoder"], jnp.asarray(pictures)), theirs, atol=1e-4 * np.abs(theirs).max()
    )


def test_a_bin_with_code_in_it_is_refused(base_and_params, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weights": subprocess.Popen}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.bin is damaged or holds more than tensors"):
        bases.load_part(tmp_path, "unet", base_and_params[0].param_shapes()["unet"])


def test_damage_is_named_in_one_line(base_and_params, tmp_path):
    base, params = base_and_params
    shapes = base.param_shapes()["unet"]
    tensors = tensors_of(params, "unet", np.float32)
    write_sharded(tmp_path, tensors)
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"00002-of-00002.safetensors does not exist though .* names it"):
        bases.load_part(tmp_path, "unet", shapes)
    save_file(
        {**tensors, "conv_in.weight": tensors["conv_in.weight"][:, :2].copy()}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(UserError, match=r"conv_in.weight has shape .* promises"):
        bases.load_part(tmp_path, "unet", shapes)


def test_another_architecture_is_refused(base_and_params, tmp_path):
    base, params = base_and_params
    bases.save_folder(tmp_path, base, params)
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "addition_embed_type": "text_time"}))
    with pytest.raises(UserError, match=r"unet/config.json describes .*addition_embed_type; only Stable Diffusion 1.x and 2.x"):
        bases.load_folder(tmp_path)


def test_a_name_that_leads_nowhere_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"base: nowhere: no such folder, and not a Hub id"):
        bases.find_folder("nowhere", "base")
    with pytest.raises(UserError, match=r"base: owner/model-that-is-not-there: it is neither a folder nor in the Hub's cache"):
        bases.find_folder("owner/model-that-is-not-there", "base")


def test_a_repository_in_the_cache_needs_no_connection(base_and_params, tmp_path):
    """The Hub's own layout of its cache, read in a process of its own, since the library reads its settings at import."""
    base, params = base_and_params
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / ("0" * 40)
    bases.save_folder(snapshot, base, params)
    reference = tmp_path / "models--owner--tiny" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("0" * 40)
    code = "from e4t_jax.bases import find_folder; print(find_folder('owner/tiny', 'base'))"
    environment = {**__import__("os").environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(snapshot)


@pytest.mark.compiles
@pytest.mark.parametrize(("name", "millions"), [("sd15", (859.5, 83.7, 123.1)), ("sd21", (865.9, 83.7, 340.4))])
def test_true_geometries_have_the_known_numbers_of_weights(name, millions):
    """Millions of weights of U-Net, VAE and text encoder, as the models' cards state them; F = 10,880."""
    tokenizer = tokenizer_of_words(known_words(), bases.TEXT_LENGTH, bases.VOCABULARY)
    assert (len(tokenizer), tokenizer.eos_token_id) == (49408, 49407)
    base = bases.StableDiffusion(bases.geometry(name, "vit-h14"), tokenizer)
    shapes = base.param_shapes()
    counted = [sum(leaf.size for leaf in jax.tree.leaves(shapes[part])) / 1e6 for part in ("unet", "vae", "text_encoder")]
    np.testing.assert_allclose(counted, millions, atol=0.06)
    assert base.feature_width == 10_880
    assert (base.image_size, base.latent_shape) == {"sd15": (512, (64, 64, 4)), "sd21": (768, (96, 96, 4))}[name]


def test_a_byte_that_flips_is_noticed_in_every_file_of_weights_and_words(folder):
    """And a file that is another base's, or gone."""
    sealed = json.loads((folder / "model_index.json").read_text())["_checksums"]
    assert sorted(sealed) == sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix == ".safetensors" or path.name in ("vocab.json", "merges.txt", "tokenizer.json")
    )
    for name in sealed:
        path = folder / name
        content = path.read_bytes()
        if name.startswith("tokenizer"):
            path.write_bytes(content.replace(b"creature", b"creatuer", 1) if b"creature" in content else content + b"a b\n")
        else:
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        assert_one_line(folder, rf"{name} (was changed since it was written|is damaged)")
        path.write_bytes(content)
    bases.load_base(str(folder))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert_one_line(folder, "vae/diffusion_pytorch_model.safetensors does not exist though model_index.json names it")


@pytest.mark.compiles
def test_checksums_are_nothing_to_pytorch(folder, tmp_path):
    """Both pipeline classes load the half-precision folder and draw, the text encoder of its own class, all in float32.

    What they write again is a base again.
    """
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    for kind in (diffusers.DiffusionPipeline, diffusers.StableDiffusionPipeline):
        pipeline = kind.from_pretrained(folder)
        assert type(pipeline).__name__ == "StableDiffusionPipeline"
        assert type(pipeline.text_encoder).__name__ == "CLIPTextModel"
        assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    base, params = bases.load_folder(folder)
    assert "text_projection" in params["text_encoder"]
    ids = np.asarray(base.tokenizer(["a red creature"], padding="max_length").input_ids)
    with torch.no_grad():
        theirs = pipeline.text_encoder(torch.tensor(ids))[0].numpy()
    np.testing.assert_allclose(base.read(params["text_encoder"], jnp.asarray(ids)), theirs, atol=1e-4 * np.abs(theirs).max())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a creature", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)
    pipeline.save_pretrained(tmp_path / "again")
    bases.load_base(str(tmp_path / "again"))


def test_a_base_is_written_whole_or_not_at_all(base_and_params, folder, monkeypatch):
    """The disk fills at the third file: one line, the older base is as it was, nothing is left over."""
    from e4t_jax.bases.stable_diffusion import folder as module

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    written = []

    def full(path, content):
        written.append(path)
        if len(written) == 3:
            raise UserError(f"Cannot write {path}: No space left on device; choose another folder or free some space.")
        return write_file(path, content)

    write_file = module.write_file
    monkeypatch.setattr(module, "write_file", full)
    base, params = base_and_params
    with pytest.raises(UserError, match=rf"^Cannot write {folder}/\w+/[^\n]*No space left on device[^\n]*$"):
        bases.save_folder(folder, base, {part: jax.tree.map(lambda leaf: leaf + 1, params[part]) for part in params})
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sorted(path.name for path in folder.iterdir()) == sorted({path.relative_to(folder).parts[0] for path in before})


def test_weights_that_are_not_finite_are_neither_written_nor_read(base_and_params, tmp_path):
    base, params = base_and_params
    large = {**params, "vae": jax.tree.map(lambda leaf: leaf * 1e6, params["vae"])}
    with pytest.raises(UserError, match=r"dtype: vae: \S+ holds numbers that are not finite as float16; write float32"):
        bases.save_folder(tmp_path, base, large)
    assert not (tmp_path / "model_index.json").exists()
    tensors = tensors_of(params, "unet", np.float32)
    tensors["conv_in.bias"][0] = np.nan
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"conv_in.bias holds numbers that are not finite"):
        bases.load_part(tmp_path, "unet", base.param_shapes()["unet"])


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"in_channels": 9}, "in_channels = 9 with out_channels = 4 is a model that is given more than z_t"),
        ({"in_channels": 5}, "in_channels = 5 with out_channels = 4"),
        ({"in_channels": 9, "out_channels": 9}, "in_channels = 9 of unet/config.json and latent_channels = 4 of vae differ"),
        ({"cross_attention_dim": 24}, "cross_attention_dim = 24 of unet and hidden_size = 16 of text_encoder differ"),
        ({"norm_num_groups": None}, "norm_num_groups = None is not supported"),
    ],
)
def test_a_unet_of_another_kind_is_refused_at_load(folder, entries, said):
    change(folder / "unet" / "config.json", **entries)
    assert_one_line(folder, said)


@pytest.mark.compiles
def test_the_scheduler_is_the_class_that_the_index_names(folder):
    """As in PyTorch, whose pipelines make what model_index.json says of what scheduler_config.json holds."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    change(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    change(folder / "scheduler" / "scheduler_config.json", beta_end=0.5, _use_default_values=["beta_end"])
    base, _ = bases.load_base(str(folder))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder).scheduler
    assert base.scheduler["_class_name"] == type(theirs).__name__ == "EulerDiscreteScheduler"
    from e4t_jax.bases.scheduler_config import noise_schedule

    np.testing.assert_allclose(noise_schedule(base.scheduler).alphas_cumprod, theirs.alphas_cumprod.numpy(), atol=1e-5)
    change(folder / "scheduler" / "scheduler_config.json", use_karras_sigmas=True)
    assert_one_line(folder, "scheduler_config.json: use_karras_sigmas is supported as False alone")


def test_an_old_small_size_is_read_as_pytorch_reads_it(folder):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    change(folder / "unet" / "config.json", _diffusers_version="0.2.2")
    base, _ = bases.load_base(str(folder))
    assert base.unet.sample_size == 64 == diffusers.StableDiffusionPipeline.from_pretrained(folder).unet.config.sample_size


@pytest.mark.compiles
@pytest.mark.parametrize(
    "wrap", [lambda t: {"state_dict": t, "epoch": 3}, lambda t: {"model": {"state_dict": t}}, "parallel", "old"]
)
def test_wrapped_and_old_files_of_pytorch_are_read(base_and_params, tmp_path, wrap):
    torch = pytest.importorskip("torch")
    base, params = base_and_params
    tensors = {name: torch.tensor(value) for name, value in tensors_of(params, "unet", np.float32).items()}
    path = tmp_path / "diffusion_pytorch_model.bin"
    if wrap == "parallel":
        torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, path)
    elif wrap == "old":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(wrap(tensors), path)
    loaded = bases.load_part(tmp_path, "unet", base.param_shapes()["unet"])
    jax.tree.map(np.testing.assert_array_equal, loaded, params["unet"])
    for content in ([1, 2], torch.ones(2), {"state_dict": {}}, {"epoch": 3}):
        torch.save(content, path)
        with pytest.raises(UserError, match="holds no tensors by name"):
            bases.load_part(tmp_path, "unet", base.param_shapes()["unet"])


def test_a_random_image_encoder_goes_with_a_folder(base_and_params, tmp_path, monkeypatch):
    """Of the geometry it names, kernels of variance 1/fan_in, the same in every process and as stored whatever the dtype."""
    base, params = base_and_params
    tiny = {**base.configs["image_encoder"], "hidden_size": 32, "intermediate_size": 64}
    monkeypatch.setitem(geometries.IMAGE_ENCODERS, "vit-h14", tiny)
    bases.save_folder(tmp_path, base, {part: params[part] for part in ("vae", "unet", "text_encoder")})
    loaded = open_base(str(tmp_path), "random:vit-h14")
    drawn = flatten_dict(loaded.params["image_encoder"], sep="/")
    assert loaded.base.image_encoder.width == 32
    wide = np.concatenate([np.ravel(leaf) * leaf.shape[0] ** 0.5 for name, leaf in drawn.items() if name.endswith("fc1/kernel")])
    assert len(wide) == 2 * 32 * 64 and abs(wide.mean()) < 0.06 and abs(wide.std() - 1) < 0.05
    again = open_base(str(tmp_path), "random:vit-h14", dtype="bfloat16")
    assert fingerprint(loaded.stored["image_encoder"]) == fingerprint(again.stored["image_encoder"])
    halves = jax.tree.map(lambda leaf: np.float32(np.float16(leaf)), params["vae"])
    jax.tree.map(np.testing.assert_array_equal, loaded.params["vae"], halves)


@pytest.mark.parametrize(
    ("name", "image_encoder", "line"),
    [
        ("{}", "random:vit-g14", "image_encoder: random:vit-g14 is unknown; choose one of random:vit-l14, random:vit-h14"),
        ("random:sd15", "openai/clip", "image_encoder: openai/clip does not go with the base random:sd15; choose random:vit-l14"),
        ("random:sd3", None, "base: random:sd3 is unknown; choose one of random:sd15, random:sd21"),
    ],
)
def test_a_random_part_of_another_name_is_told_the_names(folder, name, image_encoder, line):
    with pytest.raises(UserError, match=f"^{line}"):
        open_base(name.format(folder), image_encoder)
