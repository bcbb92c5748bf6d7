"""The tensors of a checkpoint as encoder, offsets and image encoder.

The public encoder differs from the paper's in one point: it sees tokens of CLIP's last layer, not class tokens of many layers
("bicubic-tokens" and "bicubic-normed-tokens" of `bases.image_encoders.clip`). Its offset networks are rank-3 factors, exactly
(`offsets`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e4t_jax.bases import Params
from e4t_jax.errors import UserError
from e4t_jax.offsets import Factors, Networks, OffsetNetwork, factors_of_network

State = Mapping[str, Any]  # name -> NumPy array; read, and refused, when it is asked for
TOWER = "clip_vision."  # before the names of the image encoder's tensors
_network_factors = jax.jit(factors_of_network)
# Field of `OffsetNetwork` -> the tensor's name after its owner's.
NETWORK = {
    "v": "v",
    "linear1_weight": "linear1.weight",
    "linear1_bias": "linear1.bias",
    "linear2_weight": "linear2.weight",
    "linear2_bias": "linear2.bias",
    "column_weight": "linear_column.weight",
    "column_bias": "linear_column.bias",
    "row_weight": "linear_row.weight",
    "row_bias": "linear_row.bias",
}
# OpenCLIP's name of a layer -> transformers'.
VISION = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def take(state: State, name: str, file: str) -> np.ndarray:
    """One tensor of a checkpoint, float32.

    Errors: `UserError` when it is not there.
    """
    if name not in state:
        raise UserError(f"{file} lacks the tensor {name}; give a checkpoint of the public E4T implementation.")
    return np.asarray(state[name], np.float32)


def read_networks(state: State, file: str) -> Networks:
    """Every offset network in a checkpoint (weight_offsets.pt or unet.pt), by the kernel's name here.

    Errors: `UserError` when there is none, or one is incomplete.
    """
    owners = sorted({match[1] for name in state if (match := re.fullmatch(r"(.+\.wo_[qkv])\.v", name))})
    if not owners:
        raise UserError(f"{file} holds no weight offsets; give a checkpoint of the public E4T implementation.")
    networks = {}
    for owner in owners:
        network = OffsetNetwork(**{ours: jnp.asarray(take(state, f"{owner}.{name}", file)) for ours, name in NETWORK.items()})
        path = re.sub(r"\.(\d+)(?=\.)", r"_\1", owner).replace(".", "/")
        networks[re.sub(r"wo_([qkv])$", r"to_\1", path)] = network
    return networks


def factors_of(networks: Networks) -> Factors:
    """Rank-3 factors of each of them."""
    return {name: _network_factors(network) for name, network in networks.items()}


def read_encoder(state: State, file: str) -> Params:
    """The parameters of `encoder.ConceptEncoder` with one layer for each token, as NumPy arrays.

    Errors: `UserError` for a checkpoint that lacks a part.
    """

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": take(state, f"{name}.weight", file).T, "bias": take(state, f"{name}.bias", file)}

    count = sum(bool(re.fullmatch(r"first_linears\.\d+\.weight", name)) for name in state)
    first = linear("first_linears.0")
    layers = {part: np.empty((count, *tensor.shape), np.float32) for part, tensor in first.items()}
    for index in range(count):  # one at a time: they are most of the encoder
        for part, tensor in linear(f"first_linears.{index}").items():
            layers[part][index] = tensor
    shared = linear("feature_linear")
    return {
        "unet_hidden": linear("unet_feature_embedder.0"),
        "unet_output": linear("unet_feature_embedder.2"),
        "shared_kernel": shared["kernel"],
        "shared_bias": shared["bias"],
        "layer_kernels": layers["kernel"],
        "layer_biases": layers["bias"],
        "final": linear("final_linear"),
    }


def read_image_encoder(state: State, file: str, model: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(configuration, tensors) in transformers' names of the OpenCLIP tower inside a checkpoint's encoder.

    `model` is what the checkpoint's settings call the tower.

    Errors: `UserError` for a tower that lacks a part.
    """

    def of_tower(name: str) -> np.ndarray:
        return take(state, f"{TOWER}{name}", file)

    patches = of_tower("conv1.weight")
    if patches.ndim != 4:
        raise UserError(f"{file}: clip_vision.conv1.weight is no convolution; give a checkpoint of the public E4T implementation.")
    width, _, patch, _ = patches.shape
    tensors = {
        "embeddings.patch_embedding.weight": patches,
        "embeddings.class_embedding": of_tower("class_embedding"),
        "embeddings.position_embedding.weight": of_tower("positional_embedding"),
    }
    for leaf in ("weight", "bias"):
        tensors[f"pre_layrnorm.{leaf}"] = of_tower(f"ln_pre.{leaf}")  # spelled so in transformers
        tensors[f"post_layernorm.{leaf}"] = of_tower(f"ln_post.{leaf}")
    layers = sum(name.startswith(TOWER) and name.endswith("ln_1.weight") for name in state)
    for index in range(layers):
        tensors |= _vision_layer(of_tower, index)
    config = {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": of_tower("transformer.resblocks.0.mlp.c_fc.bias").size,
        "num_hidden_layers": layers,
        # OpenCLIP's large towers (L, H, g, G) all have 16 heads; the small ones have heads of 64 channels.
        "num_attention_heads": 16 if width >= 1024 else max(1, width // 64),
        "patch_size": patch,
        "image_size": patch * round((len(tensors["embeddings.position_embedding.weight"]) - 1) ** 0.5),
        # The weights that OpenAI trained have an activation of their own. None of its towers is wider than 1024: of a wider one,
        # the settings hold a default that the public code never read.
        "hidden_act": "quick_gelu" if "openai" in model and width <= 1024 else "gelu",
    }
    return config, {f"vision_model.{name}": np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _vision_layer(of_tower: Callable[[str], np.ndarray], index: int) -> dict[str, np.ndarray]:
    """The tensors of one layer of the tower in transformers' names; queries, keys and values are one tensor in OpenCLIP."""
    theirs, ours = f"transformer.resblocks.{index}", f"encoder.layers.{index}"
    tensors = {}
    for leaf in ("weight", "bias"):
        for open_clip, name in VISION.items():
            tensors[f"{ours}.{name}.{leaf}"] = of_tower(f"{theirs}.{open_clip}.{leaf}")
        thirds = np.split(of_tower(f"{theirs}.attn.in_proj_{leaf}"), 3)
        for letter, third in zip("qkv", thirds, strict=True):
            tensors[f"{ours}.self_attn.{letter}_proj.{leaf}"] = third
    return tensors
