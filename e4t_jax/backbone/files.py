"""Base models on disk: the diffusers folder layout, weights in PyTorch's names and layouts, without PyTorch.

    model_index.json  scheduler/  tokenizer/  vae/  unet/  text_encoder/  image_encoder/

Every leaf of the Flax tree knows its PyTorch name (`torch_name`) and layout, so that reading walks the tree that the
configuration promises and takes each tensor by name: nothing is guessed, and what is missing is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from transformers import CLIPTokenizer

from e4t_jax.backbone.base import Base, Params, param_shapes
from e4t_jax.errors import UserError
from e4t_jax.writing import write_file

_WEIGHTS = {
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
    "image_encoder": "model",
}
_CLASSES = {
    "vae": ("diffusers", "AutoencoderKL"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Flax's name of a VAE attention layer -> PyTorch's, newer and older.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def torch_name(part: str, path: str) -> str:
    """PyTorch's name of a Flax leaf: "down_blocks_0/resnets_1/conv1/kernel" -> "down_blocks.0.resnets.1.conv1.weight"."""
    *modules, leaf = path.split("/")
    if part == "vae" and len(modules) > 1 and modules[-2].startswith("attentions_"):
        modules[-1] = _VAE_ATTENTION.get(modules[-1], modules[-1])
    if part in ("vae", "unet"):
        # "linear_1" of the time embedding is PyTorch's own name; every other number counts modules of a list.
        modules = [name if name.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", name) for name in modules]
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def _older_name(name: str) -> str:
    for flax, torch in _VAE_ATTENTION.items():
        name = name.replace(f".{torch}.", f".{flax}.")
    return name


def to_torch(path: str, leaf: np.ndarray) -> np.ndarray:
    """A leaf in PyTorch's layout: kernels [in, out] -> [out, in], [h, w, in, out] -> [out, in, h, w]."""
    if not path.endswith("/kernel"):
        return leaf
    return np.ascontiguousarray(leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T)


def from_torch(path: str, tensor: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `to_torch`; a 1×1 convolution may have been stored as a linear layer and the other way round."""
    if not path.endswith("/kernel"):
        return tensor
    if tensor.ndim == 4 and len(shape) == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    elif tensor.ndim == 2 and len(shape) == 4:
        tensor = tensor[:, :, None, None]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def save_base(folder: Path, base: Base, params: Params, dtype: Any = np.float16) -> None:
    """Writes a base as a diffusers folder that PyTorch's classes load too."""
    folder = Path(folder)
    for part in _WEIGHTS:
        save_part(folder, part, params[part], dtype)
        config = dict(base.configs[part])
        if part in ("vae", "unet"):
            config = {"_class_name": _CLASSES[part][1], **config}
        else:
            config = {"model_type": "clip_text_model" if part == "text_encoder" else "clip_vision_model", **config}
        _write_json(folder / part / "config.json", config)
    _write_json(folder / "scheduler" / "scheduler_config.json", dict(base.scheduler))
    base.tokenizer.save_pretrained(folder / "tokenizer")
    _write_json(
        folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **{k: list(v) for k, v in _CLASSES.items()}}
    )


def save_part(folder: Path, part: str, params: Params, dtype: Any = np.float16) -> None:
    """Writes the weights of one part in PyTorch's names and layouts."""
    flat = flatten_dict(params, sep="/")
    tensors = {torch_name(part, path): to_torch(path, np.asarray(leaf)).astype(dtype) for path, leaf in flat.items()}
    write_file(folder / part / f"{_WEIGHTS[part]}.safetensors", save(tensors, {"format": "pt"}))


def _write_json(path: Path, content: dict) -> None:
    write_file(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_base(folder: Path, dtype: Any = jnp.float32) -> tuple[Base, Params]:
    """Reads a base from a diffusers folder, tensor by tensor, as `dtype`.

    Errors: `UserError`, one line that names the file, when one is missing, damaged or of another architecture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"The base model {folder} does not exist; give a folder in the diffusers layout.")
    configs = {part: _read_json(folder / part / "config.json") for part in _WEIGHTS}
    configs["scheduler"] = _read_json(folder / "scheduler" / "scheduler_config.json")
    if not (folder / "tokenizer" / "vocab.json").exists():
        raise UserError(f"{folder / 'tokenizer' / 'vocab.json'} does not exist; the base model is incomplete, copy it again.")
    base = Base(configs, CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))
    shapes = param_shapes(base)
    return base, {part: load_part(folder, part, shapes[part], dtype) for part in _WEIGHTS}


def load_part(folder: Path, part: str, shapes: Params, dtype: Any = jnp.float32) -> Params:
    """Reads the weights of one part into the tree that `shapes` promises."""
    expected = flatten_dict(shapes, sep="/")
    with ExitStack() as stack:
        files = list(_weight_files(folder / part, _WEIGHTS[part]))
        try:
            readers = {path: stack.enter_context(safe_open(path, framework="flax")) for path in files}
        except (SafetensorError, OSError) as error:
            raise UserError(f"The weights in {folder / part} are damaged ({error}); copy them again.") from None
        places = {name: reader for reader in readers.values() for name in reader.keys()}  # noqa: SIM118, no dict
        loaded = {}
        for path, promised in expected.items():
            name = torch_name(part, path)
            name = name if name in places else _older_name(name)
            if name not in places:
                raise UserError(f"{files[0]} lacks the tensor {name} that config.json beside it promises; copy both again.")
            tensor = from_torch(path, places[name].get_tensor(name), promised.shape)
            if tensor.shape != promised.shape:
                raise UserError(
                    f"{files[0]}: {name} has shape {tuple(tensor.shape)} where config.json beside it promises "
                    f"{promised.shape} (in Flax's layout); give weights and configuration of one model."
                )
            loaded[path] = jnp.asarray(tensor, dtype)
    return unflatten_dict(loaded, sep="/")


def _weight_files(folder: Path, stem: str) -> Iterator[Path]:
    """The single file, or the shards that an index names; half-precision variants too."""
    for variant in ("", ".fp16"):
        single, index = folder / f"{stem}{variant}.safetensors", folder / f"{stem}.safetensors.index{variant}.json"
        if single.exists():
            yield single
            return
        if index.exists():
            for name in sorted(set(_read_json(index)["weight_map"].values())):
                if not (folder / name).exists():
                    raise UserError(f"{folder / name} does not exist though {index.name} names it; copy it again.")
                yield folder / name
            return
    raise UserError(f"{folder} holds no {stem}.safetensors; give a base model with safetensors weights.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the base model is incomplete, copy it again.") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged; copy it again.") from None
