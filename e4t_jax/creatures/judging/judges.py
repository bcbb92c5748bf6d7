"""The judges of the embedded world: who is it, where and how is it drawn, what does it look like. Evaluation only.

All look at 32 by 32 RGB pictures in [-1, 1]; the method never sees them. The identity judge maps a picture to a unit vector,
near for two pictures of one identity whatever their context, style and pose; the scene judge classifies class, context and
style; the attribute judge reads off a creature each of the attributes that captions have words for. Fish have an identity
judge of their own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float
from safetensors.flax import load_file

from e4t_jax.arrays import Array
from e4t_jax.creatures.shipped import ASSETS
from e4t_jax.creatures.world.attributes import (
    BODY_HUES,
    CLASSES,
    CONTEXTS,
    EARS,
    EYES,
    HATS,
    MOUTHS,
    PATTERNS,
    SHAPES,
    STYLES,
    TRIM_HUES,
)

SCENE_HEADS = {"class": len(CLASSES), "context": len(CONTEXTS), "style": len(STYLES)}
ATTRIBUTE_HEADS = {
    "shape": len(SHAPES),
    "ears": len(EARS),
    "eyes": len(EYES),
    "mouth": len(MOUTHS),
    "pattern": len(PATTERNS),
    "hat": len(HATS),
    "tail": 2,
    "cheeks": 2,
    "feet": 2,
    "hue": len(BODY_HUES),
    "trim": len(TRIM_HUES),
}
JUDGES_FOLDER = ASSETS / "judges"


class _Trunk(nn.Module):
    """Four convolutions, three of them strided; the last map is kept coarse, since where a colour sits tells who it is."""

    widths: tuple[int, ...] = (24, 48, 96, 128)

    @nn.compact
    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch features"]:
        x = images
        for index, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=2 if index < 3 else 1)(x)
            x = nn.gelu(nn.GroupNorm(8)(x))
        x = nn.Conv(64, (1, 1))(x)
        return nn.gelu(nn.Dense(256)(x.reshape(x.shape[0], -1)))


class IdentityJudge(nn.Module):
    """Picture -> unit vector of identity."""

    width: int = 64

    @nn.compact
    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch width"]:
        x = nn.Dense(self.width)(_Trunk()(images))
        return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


class Classifier(nn.Module):
    """Picture -> logits of each head, given as (name, number of labels)."""

    heads: tuple[tuple[str, int], ...]
    widths: tuple[int, ...] = (24, 48, 96, 128)

    @nn.compact
    def __call__(self, images: Float[Array, "batch h w 3"]) -> dict[str, Float[Array, "batch labels"]]:
        x = _Trunk(self.widths)(images)
        return {name: nn.Dense(count, name=name)(x) for name, count in self.heads}


JUDGES: dict[str, nn.Module] = {
    "identity": IdentityJudge(),
    "scene": Classifier(tuple(SCENE_HEADS.items())),
    "attributes": Classifier(tuple(ATTRIBUTE_HEADS.items()), (64, 128, 192, 256)),
    "fish": IdentityJudge(),
}
WHO_IS_IT = {"creature": "identity", "fish": "fish"}  # class -> the judge of its identities


@partial(jax.jit, static_argnames="name")
def _judge(name: str, params: dict, images: Array):
    return JUDGES[name].apply({"params": params}, images)


def judge(name: str, params: dict, images: Float[np.ndarray, "batch h w 3"], *, chunk: int = 128):
    """The verdict of judge `name` (a key of `JUDGES`) on any number of pictures, as NumPy arrays."""
    count = len(images)
    padded = np.concatenate([images, np.zeros((-count % chunk, *images.shape[1:]), images.dtype)])
    parts = [_judge(name, params, jnp.asarray(padded[s : s + chunk])) for s in range(0, len(padded), chunk)]
    return jax.tree.map(lambda *rows: np.concatenate([np.asarray(row) for row in rows])[:count], *parts)


def load_judges(folder: Path = JUDGES_FOLDER) -> dict[str, dict]:
    """Parameters of all judges, by the keys of `JUDGES`."""
    return {
        name: unflatten_dict(
            {tuple(key.split("/")): value.astype(jnp.float32) for key, value in load_file(folder / f"{name}.safetensors").items()}
        )
        for name in JUDGES
    }


def flatten_judge(params: dict) -> dict[str, np.ndarray]:
    """Names and float16 arrays, as `load_judges` reads them."""
    return {"/".join(key): np.asarray(value, np.float16) for key, value in flatten_dict(params).items()}
