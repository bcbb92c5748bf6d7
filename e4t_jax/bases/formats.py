"""The weights of one part in a folder, whatever file format they came in; one tensor in memory at a time where that is possible.

safetensors      one file, or shards with an index; "fp16" variants too
.bin             PyTorch's, only where PyTorch is installed, and never with code in it (`weights_only=True`)
.msgpack         Flax's
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open

from e4t_jax import storage
from e4t_jax.errors import UserError, reason_of

# File stems: of PyTorch's weights in safetensors, in .bin, and of Flax's weights.
STEMS = {
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model", "diffusion_flax_model"),
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model", "diffusion_flax_model"),
    "text_encoder": ("model", "pytorch_model", "flax_model"),
    "image_encoder": ("model", "pytorch_model", "flax_model"),
}


# Under what trainers put a model's tensors in a file that holds more, and what a wrapper for several devices puts before names.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PARALLEL = "module."


class Weights(NamedTuple):
    """Where a part's tensors lie, and how to read one by name; Flax's own names and layouts where `flax`."""

    file: Path  # the file, or the first of the shards, for messages
    read: dict[str, Callable[[], np.ndarray]]
    flax: bool = False


def open_weights(folder: Path, part: str) -> Weights:
    """The weights of `part` in its folder: the first of safetensors, .bin and .msgpack that is there.

    Errors: `UserError` when none is there, one is damaged, or a .bin is all there is and PyTorch is not installed.
    """
    safe, torch, flax = STEMS[part]
    for find, stem, suffix in ((_safetensors, safe, "safetensors"), (_bin, torch, "bin")):
        files = _files(folder, stem, suffix)
        if files:
            read: dict[str, Callable[[], np.ndarray]] = {}
            for file in files:
                read |= find(file)
            return Weights(files[0], read)
    file = folder / f"{flax}.msgpack"
    if file.exists():
        return Weights(file, _msgpack(file), flax=True)
    raise UserError(f"{folder} holds no {safe}.safetensors, {torch}.bin or {flax}.msgpack; the base model is incomplete.")


def _files(folder: Path, stem: str, suffix: str) -> list[Path]:
    """The single file, or the shards that an index names; half-precision variants too."""
    for variant in ("", ".fp16"):
        single, index = folder / f"{stem}{variant}.{suffix}", folder / f"{stem}.{suffix}.index{variant}.json"
        if single.exists():
            return [single]
        if index.exists():
            files = [folder / name for name in shards(index)]
            missing = [file for file in files if not file.exists()]
            if missing:
                raise UserError(f"{missing[0]} does not exist though {index.name} names it; copy it again.")
            return files
    return []


def shards(index: Path) -> list[str]:
    """The names of the files that an index of shards names.

    Errors: `UserError` when it is damaged or names none.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} is damaged (it maps no weights to files); copy it again.")
    return sorted(set(names.values()))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder.

    Errors: `UserError` when it is missing, damaged or no object.
    """
    return storage.read_json(path, "the model is incomplete, copy it again")


def _safetensors(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    def read(name: str) -> np.ndarray:
        # Opened for each tensor: a file that stays mapped counts in memory with every page that was ever read.
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: partial(read, name) for name in file.keys()}  # noqa: SIM118, no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again.") from None


def _bin(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    tensors = load_pickled(path)
    return {name: partial(_to_numpy, tensor) for name, tensor in tensors.items()}


def load_pickled(path: Path) -> dict[str, Any]:
    """The tensors of a .bin or .pt file by name, mapped rather than read, unwrapped; PyTorch refuses to run any code in it.

    Errors: `UserError` when PyTorch is not installed, or the file is damaged or holds more than tensors.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs PyTorch to be read; pip install torch, or give the model's safetensors weights.") from None
    content: Any = None
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # PyTorch's format before 1.6
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path.") from None
    except Exception as error:  # the unpickler raises whatever the damage makes it raise
        reason = reason_of(error)
        raise UserError(f"{path} is damaged or holds more than tensors ({reason}); copy it again.") from None
    tensors = {name: one for name, one in _unwrapped(content).items() if isinstance(one, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; give a file of a model's weights.")
    if all(name.startswith(_PARALLEL) for name in tensors):
        tensors = {name.removeprefix(_PARALLEL): one for name, one in tensors.items()}
    return tensors


def _unwrapped(content: Any) -> dict[str, Any]:
    """The dictionary of tensors by name, out of those that trainers put around it."""
    while isinstance(content, dict):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
        if inner is None:
            return {str(name): one for name, one in content.items()}
        content = inner
    return {}


def _to_numpy(tensor: Any) -> np.ndarray:
    # NumPy has no bfloat16 that PyTorch knows of; float32 holds every bfloat16 exactly.
    return (tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).detach().numpy()


def _msgpack(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        tree = msgpack_restore(path.read_bytes())
        leaves = flatten_dict(tree, sep="/")
    except Exception as error:  # msgpack raises many kinds of errors for damaged files
        raise UserError(f"{path} is damaged ({type(error).__name__}); copy it again.") from None
    return {name: partial(np.asarray, leaf) for name, leaf in leaves.items()}
