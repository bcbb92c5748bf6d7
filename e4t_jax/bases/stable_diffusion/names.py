"""PyTorch's names and layouts of Stable Diffusion's weights, from the paths of our trees; nothing is guessed, all is walked."""

from __future__ import annotations

import re

import numpy as np

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


def other_name(name: str) -> str:
    """Its name in diffusers before attention layers were one class, or in transformers 5 where CLIP's tower stands alone."""
    for flax, torch in _VAE_ATTENTION.items():
        name = name.replace(f".{torch}.", f".{flax}.")
    return name.removeprefix("text_model.").removeprefix("vision_model.")


def to_torch(path: str, leaf: np.ndarray) -> np.ndarray:
    """A leaf in PyTorch's layout: kernels [in, out] -> [out, in], [h, w, in, out] -> [out, in, h, w]."""
    if not path.endswith("/kernel"):
        return leaf
    return np.ascontiguousarray(leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T)


def from_torch(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_torch`; a 1×1 convolution may have been stored as a linear layer and the other way round."""
    if not path.endswith("/kernel"):
        return tensor
    if tensor.ndim == 4 and len(shape) == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    elif tensor.ndim == 2 and len(shape) == 4:
        tensor = tensor[:, :, None, None]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
