"""Encoder, offset networks and image encoder in the public code's names: the inverse of `tensors`, number for number."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict

from e4t_jax.bases import Params, torch_name
from e4t_jax.bases.stable_diffusion.names import to_torch
from e4t_jax.interop.e4t_diffusion.tensors import NETWORK, VISION, State
from e4t_jax.offsets import OffsetNetwork


def module_name(path: str) -> str:
    """The public code's name of the module with this kernel: "down_blocks_0/…/attn1/to_q" -> "down_blocks.0.….attn1.to_q"."""
    return torch_name("unet", f"{path}/kernel").removesuffix(".weight")


def offsets_state(networks: Mapping[str, OffsetNetwork]) -> State:
    """What `tensors.read_networks` reads, of every network by its kernel's name."""
    state: dict[str, np.ndarray] = {}
    for path, network in networks.items():
        owner = re.sub(r"\.to_([qkv])$", r".wo_\1", module_name(path))
        state |= {f"{owner}.{name}": np.asarray(getattr(network, ours), np.float32) for ours, name in NETWORK.items()}
    return state


def encoder_state(encoder: Params) -> State:
    """What `tensors.read_encoder` reads."""
    layers = {
        "unet_feature_embedder.0": encoder["unet_hidden"],
        "unet_feature_embedder.2": encoder["unet_output"],
        "feature_linear": {"kernel": encoder["shared_kernel"], "bias": encoder["shared_bias"]},
        "final_linear": encoder["final"],
    }
    each = zip(encoder["layer_kernels"], encoder["layer_biases"], strict=True)
    layers |= {f"first_linears.{index}": {"kernel": kernel, "bias": bias} for index, (kernel, bias) in enumerate(each)}
    state = {}
    for name, layer in layers.items():
        state[f"{name}.weight"] = np.ascontiguousarray(np.asarray(layer["kernel"], np.float32).T)
        state[f"{name}.bias"] = np.asarray(layer["bias"], np.float32)
    return state


def image_encoder_state(image_encoder: Params) -> State:
    """What `tensors.read_image_encoder` reads: OpenCLIP's names, without the projection."""
    flat = flatten_dict(image_encoder["vision_model"], sep="/")
    ours = {torch_name("image_encoder", path): to_torch(path, np.asarray(leaf, np.float32)) for path, leaf in flat.items()}
    state = {
        "conv1.weight": ours.pop("embeddings.patch_embedding.weight"),
        "class_embedding": ours.pop("embeddings.class_embedding"),
        "positional_embedding": ours.pop("embeddings.position_embedding.weight"),
    }
    for leaf in ("weight", "bias"):
        state[f"ln_pre.{leaf}"] = ours.pop(f"pre_layrnorm.{leaf}")
        state[f"ln_post.{leaf}"] = ours.pop(f"post_layernorm.{leaf}")
    for index in range(sum(name.endswith("layer_norm1.weight") for name in ours)):
        layer, block = f"encoder.layers.{index}", f"transformer.resblocks.{index}"
        for leaf in ("weight", "bias"):
            state |= {f"{block}.{name}.{leaf}": ours.pop(f"{layer}.{own}.{leaf}") for name, own in VISION.items()}
            thirds = [ours.pop(f"{layer}.self_attn.{letter}_proj.{leaf}") for letter in "qkv"]
            state[f"{block}.attn.in_proj_{leaf}"] = np.concatenate(thirds)
    assert not ours, f"image encoder tensors without a place: {sorted(ours)}"
    return {f"clip_vision.{name}": tensor for name, tensor in state.items()}
