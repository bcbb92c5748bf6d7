"""Which image encoder a configuration describes. A kind is a file with a line in `registry`, and serves every base.

A folder's config.json names its kind, `model_type`; the registered function makes the static side of it:

    (config, clip_features=None, **policy) -> ImageEncoder

`clip_features` says which states it gives, the encoder's own default where None; `policy` is the base's (`dtype`, `remat`,
`attention`). Its weights are read by the names of `ImageEncoder.param_shapes`: "a/0/kernel" is PyTorch's "a.0.weight", transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e4t_jax import registry
from e4t_jax.bases.protocol import ImageEncoder
from e4t_jax.errors import UserError, shortened

_CLIP = "clip_vision_model"  # of a configuration that names none


def image_encoder_of(
    config: Mapping[str, Any], clip_features: str | None = None, *, file: Path | None = None, **policy: Any
) -> ImageEncoder:
    """The image encoder that a configuration describes.

    Args:
        config: The content of config.json.
        clip_features: Which of its states it gives; its own default where None.
        file: Where the configuration lies, for errors.
        policy: How it computes: `dtype`, `remat`, `attention`.

    Errors: `UserError` for a kind that is not registered, a configuration that is not supported, and unknown features.
    """
    kind = config.get("model_type") or _CLIP
    make = registry.find("image_encoder", kind) if isinstance(kind, str) else None
    if make is None:
        known = ", ".join(registry.names("image_encoder"))
        raise UserError(f"{file or 'config.json'} describes {shortened(kind)} as model_type; give an image encoder of {known}.")
    return make(config, clip_features, file=file, **policy)
