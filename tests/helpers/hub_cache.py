"""The Hub's cache as its library lays it out, with the repositories that `--domain faces` is made of, by their true names.

    HF_HOME/hub/models--OWNER--NAME/{refs/main, blobs/SHA256, snapshots/COMMIT/FILE -> blob, trees/COMMIT.json}

Weights are random, written by PyTorch's own classes. `TINY` takes seconds; `widths(0.5)` has the true depth in half widths, and
`widths(1)` is the true size: 4.3 GB of base and 3.4 GB of checkpoint. The words are CLIP's own 49,408 where `clip_merges` finds
them or is told where they are, and otherwise a few hundred.
"""

import gzip
import hashlib
import importlib.util
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from public_checkpoints import encoder_state, offset_state

from e4t_jax.bases import TEXT_LENGTH, VOCABULARY, StableDiffusion
from e4t_jax.bases.tokenizers import save_tokenizer, tokenizer_of_words
from e4t_jax.templates import known_words

BASE = "CompVis/stable-diffusion-v1-4"
FACES = "mshing/e4t-diffusion-ffhq-celebahq-v1"
# Other files of the base's repository, which nothing here reads: the library knows of them, and the cache lacks them.
_NOT_FETCHED = (
    "v1-4.ckpt",
    "unet/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.bin",
    "safety_checker/model.safetensors",
)


@dataclass(frozen=True)
class Geometry:
    """What there is to choose about Stable Diffusion 1.4 and the checkpoint's image encoder, a Vision Transformer."""

    unet: tuple[int, ...]  # channels of each block; all but the last attend to the prompt
    vae: tuple[int, ...]
    layers: int  # of each block
    latents: int  # a side
    text: tuple[int, int, int]  # width, layers, heads
    vision: tuple[int, int, int]  # width, layers, patches a side


TINY = Geometry(unet=(32, 64), vae=(16, 16, 16, 32), layers=1, latents=8, text=(32, 2, 2), vision=(64, 2, 4))
PATCH = 14


def widths(share: float) -> Geometry:
    """The true depth and resolution with this share of the true widths, as near as heads and groups allow."""

    def channels(*true: int) -> tuple[int, ...]:
        return tuple(32 * max(1, round(share * one / 32)) for one in true)

    heads = max(1, round(12 * share))
    vision = 64 * max(1, round(20 * share))  # read with 16 heads from 1024 on, else with heads of 64 channels
    return Geometry(channels(320, 640, 1280, 1280), channels(128, 256, 512, 512), 2, 64, (64 * heads, 12, heads), (vision, 32, 16))


def clip_merges() -> Path | None:
    """CLIP's list of merges, which comes with `open_clip_torch`; None where that is not installed."""
    found = importlib.util.find_spec("open_clip")
    file = Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if found and found.origin else None
    return file if file is not None and file.exists() else None


def write_hub_cache(home: Path, geometry: Geometry = TINY, *, base: str = BASE, merges: Path | None = None) -> None:
    """Writes the base, under the name `base`, and the public checkpoint for faces into the cache of `HF_HOME` = home."""
    with tempfile.TemporaryDirectory(dir=home.parent) as made:
        folder = Path(made, "base")
        write_base(folder, geometry, merges or clip_merges())
        configs = {part: json.loads((folder / part / "config.json").read_text()) for part in ("vae", "unet", "text_encoder")}
        write_repository(home, base, folder, _NOT_FETCHED)
        write_face_checkpoint(Path(made, "faces"), geometry, configs)
        write_repository(home, FACES, Path(made, "faces"), ("README.md",))


def write_repository(home: Path, name: str, folder: Path, others: tuple[str, ...] = ()) -> Path:
    """Moves the files of a folder into the cache as the repository `name`, which holds `others` too; the snapshot's folder."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    commit = hashlib.sha1(json.dumps([name, digests]).encode()).hexdigest()
    snapshot = place / "snapshots" / commit
    listed = {other: {"size": 1_000_000_000, "blob_id": "0" * 40} for other in others}
    for path, digest in digests.items():
        blob, link = place / "blobs" / digest, snapshot / path
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        listed[path] = {"size": (folder / path).stat().st_size, "blob_id": digest[:40], "lfs_sha256": digest}
        shutil.move(folder / path, blob)
        link.symlink_to(Path(*[".."] * (len(Path(path).parts) + 1), "blobs", digest))
    for file, content in (
        (place / "refs" / "main", commit),
        (place / "trees" / f"{commit}.json", json.dumps({"format_version": 1, "files": listed})),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return snapshot


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_base(folder: Path, geometry: Geometry, merges: Path | None = None) -> None:
    """Stable Diffusion 1.4 as diffusers writes it, its words as OpenAI published them."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    blocks, (text_width, text_layers, text_heads) = len(geometry.unet) - 1, geometry.text
    unet = UNet2DConditionModel(
        sample_size=geometry.latents,
        down_block_types=("CrossAttnDownBlock2D",) * blocks + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * blocks,
        block_out_channels=geometry.unet,
        layers_per_block=geometry.layers,
        cross_attention_dim=text_width,
        attention_head_dim=8,
    )
    unet.save_pretrained(folder / "unet")
    del unet
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(geometry.vae),
        up_block_types=("UpDecoderBlock2D",) * len(geometry.vae),
        block_out_channels=geometry.vae,
        layers_per_block=geometry.layers,
        latent_channels=4,
        norm_num_groups=min(32, geometry.vae[0]),
        sample_size=geometry.latents * 2 ** (len(geometry.vae) - 1),
    ).save_pretrained(folder / "vae")
    words = _write_tokenizer(folder / "tokenizer", merges)
    text = CLIPTextConfig(
        vocab_size=words,
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=text_layers,
        num_attention_heads=text_heads,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=1,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    _name_as_published(folder / "text_encoder" / "model.safetensors")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    parts = {"vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"]}
    parts |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    parts |= {"scheduler": ["diffusers", "PNDMScheduler"]}
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0", **parts}
    (folder / "model_index.json").write_text(json.dumps(index))


def _name_as_published(file: Path) -> None:
    """The newest transformers leave out what stands before every name in the files on the Hub."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    save_file({f"text_model.{name.removeprefix('text_model.')}": one for name, one in tensors.items()}, file, {"format": "pt"})


def _write_tokenizer(folder: Path, merges: Path | None) -> int:
    """Vocabulary and merges; the number of words."""
    if merges is None:
        tokenizer = tokenizer_of_words(known_words(), TEXT_LENGTH)
        save_tokenizer(tokenizer, folder)
        return len(tokenizer)
    # Letters, letters that end a word, and what the merges make of them, in this order: OpenAI's `simple_tokenizer`.
    pairs = gzip.decompress(merges.read_bytes()).decode().split("\n")[1 : VOCABULARY - 2 - 512 + 1]
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(one) for one in shown] + [chr(256 + index) for index in range(256 - len(shown))]
    words = [*letters, *(f"{one}</w>" for one in letters), *("".join(pair.split()) for pair in pairs)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


def write_face_checkpoint(folder: Path, geometry: Geometry, configs: dict, **settings) -> None:
    """weight_offsets.pt, encoder.pt and config.json on a base of these configurations; `settings` replace the public ones."""
    import torch

    width, layers, grid = geometry.vision
    vision = {"hidden_size": width, "num_hidden_layers": layers, "patch_size": PATCH, "image_size": PATCH * grid}
    base = StableDiffusion({**configs, "image_encoder": {**vision, "intermediate_size": 4 * width, "num_attention_heads": 1}}, None)
    generator = torch.Generator().manual_seed(1)
    kernels = base.offset_kernels(base.param_shapes()["unet"])
    folder.mkdir(parents=True)
    torch.save(encoder_state(generator, base, width=width, patch=PATCH, grid=grid, layers=layers, mlp=4), folder / "encoder.pt")
    torch.save(offset_state(generator, {path: one.shape for path, one in kernels.items()}), folder / "weight_offsets.pt")
    public = {
        "pretrained_model_name_or_path": BASE,
        "clip_model_name_or_path": "ViT-H-14::laion2b_s32b_b79k",
        "domain_class_token": "face",
        "placeholder_token": "*s",
        "prompt_template": "a photo of {placeholder_token}",
        "domain_embed_scale": 0.1,
        "reg_lambda": 0.01,
        "unfreeze_clip_vision": True,
    }
    (folder / "config.json").write_text(json.dumps({**public, **settings}))


def write_photograph(path: Path, width: int = 640, height: int = 480, seed: int = 0) -> Path:
    """A JPEG with a photograph's statistics, about: soft shading, something like a face in it, and grain."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(40, 220, (6, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(soft)
    x, y, r = width * rng.uniform(0.35, 0.65), height * 0.5, height * 0.3
    pen.ellipse((x - 0.8 * r, y - r, x + 0.8 * r, y + r), fill=(222, 180, 150))
    for side in (-1, 1):
        pen.ellipse((x + side * 0.35 * r - 9, y - 0.25 * r - 6, x + side * 0.35 * r + 9, y - 0.25 * r + 6), fill=(40, 30, 30))
    pen.arc((x - 0.4 * r, y, x + 0.4 * r, y + 0.6 * r), 20, 160, fill=(150, 60, 60), width=6)
    pixels = np.asarray(soft.filter(ImageFilter.GaussianBlur(2)), np.float32) + rng.normal(0, 6, (height, width, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, "JPEG", quality=90)
    return path
