"""From a part's config.json to its module: every key is honoured, known to change nothing, or refused by name."""

from __future__ import annotations

import dataclasses
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


def check_config(part: str, config: Mapping[str, Any], file: Any = None) -> None:
    """Refuses what the module of `part` does not compute.

    Errors: `UserError`, one line naming key, value and file.
    """
    kind, home = _PARTS[part]
    file = file or f"{part}/config.json"
    honoured = {field.name for field in dataclasses.fields(kind)} - set(_OWN)
    for key, value in config.items():
        if key in home.ONLY and _frozen(value) not in home.ONLY[key]:
            only = " or ".join(map(repr, home.ONLY[key]))
            raise UserError(
                f"{file} describes {value!r} as {key}; only Stable Diffusion 1.x and 2.x are supported, where it is {only}."
            )
        if key not in honoured and key not in home.ONLY and key not in home.INERT and value is not None:
            raise UserError(f"{file}: {key} = {value!r} is unknown here, and may change what the model computes; remove it if not.")
    wrong = kind(**_fields(kind, config)).fault()
    if wrong:
        raise UserError(f"{file}: {wrong}")


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
