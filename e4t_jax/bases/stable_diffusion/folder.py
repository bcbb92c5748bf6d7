"""Base models on disk: the diffusers folder layout, weights in PyTorch's names and layouts, without PyTorch.

    model_index.json  scheduler/  tokenizer/  vae/  unet/  text_encoder/  image_encoder/

Every leaf of the Flax tree knows its PyTorch name and layout (`names`), so that reading walks the tree that the configuration
promises and takes each tensor by name: nothing is guessed, and what is missing is said.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save
from transformers import CLIPTokenizer

from e4t_jax.bases.formats import STEMS, Weights, open_weights, read_json
from e4t_jax.bases.protocol import Params
from e4t_jax.bases.stable_diffusion.base import StableDiffusion
from e4t_jax.bases.stable_diffusion.names import from_torch, older_name, to_torch, torch_name
from e4t_jax.bases.stable_diffusion.settings import check_config
from e4t_jax.errors import UserError
from e4t_jax.storage import write_file

_CLASSES = {
    "vae": ("diffusers", "AutoencoderKL"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
}


def save_folder(folder: Path, base: StableDiffusion, params: Params, dtype: Any = np.float16) -> None:
    """Writes the parts in `params` as a diffusers folder that PyTorch's classes load too."""
    folder = Path(folder)
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    for part in params:
        save_part(folder, part, params[part], dtype)
        config = dict(base.configs[part])
        library, kind = _CLASSES[part]
        if part in ("vae", "unet"):
            config = {"_class_name": kind, **config}
        else:
            kind = kind if base.has_projection(part) else kind.removesuffix("WithProjection")
            config = {"model_type": "clip_text_model" if part == "text_encoder" else "clip_vision_model", **config}
        index[part] = [library, kind]
        write_json(folder / part / "config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", dict(base.scheduler))
    base.tokenizer.save_pretrained(folder / "tokenizer")
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", base.scheduler["_class_name"]]}
    write_json(folder / "model_index.json", index)


def save_part(folder: Path, part: str, params: Params, dtype: Any = np.float16) -> None:
    """Writes the weights of one part in PyTorch's names and layouts."""
    flat = flatten_dict(params, sep="/")
    tensors = {torch_name(part, path): to_torch(path, np.asarray(leaf)).astype(dtype) for path, leaf in flat.items()}
    write_file(folder / part / f"{STEMS[part][0]}.safetensors", save(tensors, {"format": "pt"}))


def write_json(path: Path, content: dict) -> None:
    """A JSON file with sorted keys, so that equal content gives equal files."""
    write_file(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_folder(folder: Path, dtype: Any = jnp.float32, image_encoder: Path | None = None) -> tuple[StableDiffusion, Params]:
    """Reads a base from a diffusers folder, tensor by tensor, as `dtype`.

    `image_encoder` is a folder of CLIP's in transformers' format, for bases that bring none (Stable Diffusion's do not).

    Errors: `UserError`, one line that names the file, when one is missing, damaged or of another architecture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"The base model {folder} does not exist; give a folder in the diffusers layout or a Hub id.")
    folders = {part: folder / part for part in STEMS} | ({"image_encoder": Path(image_encoder)} if image_encoder else {})
    configs = {part: read_config(part, where) for part, where in folders.items()}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    if not (folder / "tokenizer" / "vocab.json").exists():
        raise UserError(f"{folder / 'tokenizer' / 'vocab.json'} does not exist; the base model is incomplete, copy it again.")
    base = StableDiffusion(configs, CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))
    shapes = base.param_shapes()
    return base, {part: load_part(where, part, shapes[part], dtype) for part, where in folders.items()}


def read_config(part: str, folder: Path) -> dict[str, Any]:
    """A part's config.json; of a whole CLIP model, the half that sees.

    Errors: `UserError` for another architecture than Stable Diffusion 1 and 2 have, naming the key that says so.
    """
    path = folder / "config.json"
    config = read_json(path)
    if part == "image_encoder" and "vision_config" in config:
        whole = config
        config = {**whole["vision_config"], "projection_dim": whole.get("projection_dim", 512)}
        config["architectures"] = ["CLIPVisionModelWithProjection"]
    check_config(part, config, path)
    return config


def load_part(folder: Path, part: str, shapes: Params, dtype: Any = jnp.float32) -> Params:
    """Reads the weights of one part into the tree that `shapes` promises."""
    return fill_part(open_weights(folder, part), part, shapes, dtype)


def fill_part(weights: Weights, part: str, shapes: Params, dtype: Any = jnp.float32) -> Params:
    """`load_part` of weights that are open already."""
    loaded = {}
    for path, promised in flatten_dict(shapes, sep="/").items():
        name = path if weights.flax else torch_name(part, path)
        name = name if name in weights.read else older_name(name)
        if name not in weights.read:
            raise UserError(f"{weights.file} lacks the tensor {name} that config.json beside it promises; copy both again.")
        try:
            stored = weights.read[name]()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{weights.file}: {name} cannot be read ({error}); copy the file again.") from None
        tensor = stored if weights.flax else from_torch(path, stored, promised.shape)
        if tensor.shape != promised.shape:
            raise UserError(
                f"{weights.file}: {name} has shape {tuple(tensor.shape)} where config.json beside it promises "
                f"{promised.shape} (in Flax's layout); give weights and configuration of one model."
            )
        # Copied at once, one tensor at a time: the device never waits for, nor the host holds, more than that.
        loaded[path] = jax.block_until_ready(jnp.array(tensor, dtype))
    return unflatten_dict(loaded, sep="/")
