"""CLIP's image encoder (Radford et al. 2021, arXiv 2103.00020), as the concept encoder and the measures use it.

x    = (resize(I) / 2 + 1/2 - mean) / deviation          pictures I in [-1, 1]
h_k  = state after layer k of x's class token and patches

features                φ_clip
layers                  norm(h_k), class token, of every second layer k: the paper's
tokens                  h of the last layer: the class token, normed, and every second patch, not normed
bicubic-tokens          the same of pictures resized as the public PyTorch code does (`bicubic.resize_bicubic`)
bicubic-normed-tokens   and all states normed, as they are with OpenCLIP from 2.23 on
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.bases.image_encoders.bicubic import resize_bicubic
from e4t_jax.bases.protocol import Params
from e4t_jax.bases.stable_diffusion.clip import CLIPVision
from e4t_jax.bases.stable_diffusion.policy import DEFAULT, Policy
from e4t_jax.bases.stable_diffusion.settings import check_config, module_of
from e4t_jax.errors import UserError, shortened

FEATURES = ("layers", "tokens", "bicubic-tokens", "bicubic-normed-tokens")
_BICUBIC = "bicubic-"
# Channel statistics of the pictures that CLIP was trained on (Radford et al. 2021).
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_PROJECTION = 512  # the default of CLIP's configurations
_PART = "image_encoder"


@dataclasses.dataclass(frozen=True)
class ClipImageEncoder:
    """The static side of CLIP's image encoder (`bases.protocol.ImageEncoder`)."""

    config: Mapping[str, Any]
    features: str = FEATURES[0]
    policy: Policy = DEFAULT

    @cached_property
    def module(self) -> CLIPVision:
        """The tower that sees."""
        return module_of(_PART, self.config, self.policy)

    @property
    def image_size(self) -> int:
        """Pixels a side of the pictures that it was trained on, to which all are resized."""
        return self.module.image_size

    @property
    def width(self) -> int:
        """Numbers of one state."""
        return self.module.hidden_size

    @property
    def count(self) -> int:
        """How many states `see` gives."""
        patches = (self.image_size // self.module.patch_size) ** 2
        return self.module.num_hidden_layers // 2 if self.features == "layers" else 1 + patches // 2

    def see(self, weights: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b states width"]:
        """φ_clip of pictures in [-1, 1] of any size: the states that `features` names."""
        bicubic = self.features.startswith(_BICUBIC)
        states = self._apply(weights, images, "__call__", bicubic)

        def norm(states: Array) -> Array:
            return self.module.apply(_trunk(weights), states, method="norm")

        match self.features.removeprefix(_BICUBIC):
            case "layers":
                return norm(jnp.stack([state[:, 0] for state in states[2::2]], axis=1))
            case "tokens":
                return jnp.concatenate([norm(states[-1][:, :1]), states[-1][:, 2::2]], axis=1)
        return norm(jnp.concatenate([states[-1][:, :1], states[-1][:, 2::2]], axis=1))

    def embed(self, weights: Params, images: Float[Array, "b h w 3"]) -> Float[Array, "b shared"]:
        """CLIP's projected image embedding."""
        return self._apply(weights, images, "pool") @ weights["visual_projection"]["kernel"]

    def param_shapes(self) -> Params:
        """Shapes of the weights, float32; with the projection where the files hold it."""
        pixels = jnp.zeros((1, self.image_size, self.image_size, 3))
        shapes = jax.eval_shape(lambda: self.module.init(jax.random.key(0), pixels, method="pool")["params"])
        if (self.config.get("architectures") or [""])[0].endswith("WithProjection"):
            shape = (self.width, self.config.get("projection_dim", _PROJECTION))
            shapes["visual_projection"] = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        return shapes

    def _apply(self, weights: Params, images: Array, method: str, bicubic: bool = False) -> Any:
        size = self.image_size
        if bicubic:
            images = resize_bicubic(images, size)  # and what it overshoots is kept
        elif images.shape[1:3] != (size, size):
            images = jax.image.resize(images, (images.shape[0], size, size, 3), "cubic", antialias=True)
        images = images if bicubic else jnp.clip(images, -1, 1)
        pixels = (images * 0.5 + 0.5 - _MEAN) / _DEVIATION
        return self.module.apply(_trunk(weights), pixels, method=method)


def make(
    config: Mapping[str, Any], clip_features: str | None = None, *, file: Path | None = None, **policy: Any
) -> ClipImageEncoder:
    """The encoder that config.json describes, be it of a tower or of a whole CLIP model.

    Args:
        config: The content of config.json.
        clip_features: One of `FEATURES`; the paper's where None.
        file: Where the configuration lies, for errors.
        policy: Fields of `Policy`.

    Errors: `UserError` for a key that would change what is computed, and for unknown features.
    """
    if "vision_config" in config:
        whole = config
        config = {**whole["vision_config"], "projection_dim": whole.get("projection_dim", _PROJECTION)}
        config["architectures"] = ["CLIPVisionModelWithProjection"]
    check_config(_PART, config, file)
    if clip_features not in (None, *FEATURES):
        raise UserError(f"{shortened(clip_features)} is unknown; choose one of {', '.join(FEATURES)}.", "clip_features")
    return ClipImageEncoder(config, clip_features or FEATURES[0], Policy(**policy))


def _trunk(weights: Params) -> Params:
    return {"params": {"vision_model": weights["vision_model"]}}
