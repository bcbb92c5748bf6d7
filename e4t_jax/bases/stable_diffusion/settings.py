"""From a part's config.json to its module: every key is honoured, known to change nothing, or refused by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from e4t_jax.bases.stable_diffusion import clip, unet, vae
from e4t_jax.bases.stable_diffusion.policy import DEFAULT, Policy
from e4t_jax.errors import UserError

_PARTS: dict[str, tuple[type[nn.Module], Any]] = {
    "unet": (unet.UNet, unet),
    "vae": (vae.VAE, vae),
    "text_encoder": (clip.CLIPText, clip),
    "image_encoder": (clip.CLIPVision, clip),
}
# Fields of every Flax module, and ours: no keys of a configuration.
_OWN = ("policy", "parent", "name")
_MAY_BE_ZERO = ("downsample_padding", "eos_token_id", "freq_shift")


def check_config(part: str, config: Mapping[str, Any], file: Any = None) -> None:
    """Refuses what the module of `part` does not compute.

    Errors: `UserError`, one line naming key, value and file.
    """
    kind, home = _PARTS[part]
    file = file or f"{part}/config.json"
    honoured = {field.name: field.default for field in dataclasses.fields(kind) if field.name not in _OWN}
    for key, value in config.items():
        if key in home.ONLY:
            if _frozen(value) not in home.ONLY[key]:
                only = " or ".join(map(repr, home.ONLY[key]))
                raise UserError(
                    f"{file} describes {value!r} as {key}; only Stable Diffusion 1.x and 2.x are supported, where it is {only}."
                )
        elif key in honoured:
            # null too: where a module has a default, PyTorch's class reads null as something else than it.
            least = 0 if key in _MAY_BE_ZERO else 1
            if not _is_like(_frozen(value), honoured[key], str(kind.__dataclass_fields__[key].type), least):
                raise UserError(f"{file}: {key} = {value!r} is not supported; it must be like {honoured[key]!r}.")
        elif key not in home.INERT and value is not None:
            raise UserError(f"{file}: {key} = {value!r} is unknown here, and may change what the model computes; remove it if not.")
    wrong = kind(**_fields(kind, config)).fault()
    if wrong:
        raise UserError(f"{file}: {wrong}")


def _is_like(value: Any, default: Any, annotation: str, least: int) -> bool:
    """Whether a value is of the kind of a field: true or false, words, a count from `least` on, a positive number; or a list."""
    if isinstance(value, tuple):
        example = default[0] if isinstance(default, tuple) else default
        return "tuple" in annotation and len(value) > 0 and all(_is_like(one, example, "", least) for one in value)
    if isinstance(default, tuple):
        return False
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return value > 0 if "float" in annotation else isinstance(value, int) and value >= least


def module_of(part: str, config: Mapping[str, Any], policy: Policy = DEFAULT) -> Any:
    """The module that a configuration describes; `check_config`'s errors."""
    check_config(part, config)
    kind = _PARTS[part][0]
    return kind(**_fields(kind, config), policy=policy)


def _fields(kind: type[nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)} - set(_OWN)
    return {name: _frozen(value) for name, value in config.items() if name in names and value is not None}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
