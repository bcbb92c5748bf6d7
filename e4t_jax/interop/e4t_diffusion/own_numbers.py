"""Beside an exported domain: what the public code's format cannot hold, for who imports it again.

e4t_jax.safetensors has the factors as they were learned and the settings that config.json has no names for, and knows the
weight_offsets.pt it was written with: where that was trained on since, the networks in it count and this file does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.offsets import Factors
from e4t_jax.storage import file_digest, pack, unpack

FILE = "e4t_jax.safetensors"
_KIND = "e4t domain, exported"
_SETTINGS = ("regularisation", "guidance", "template", "clip_squash")
_FEATURES = "features"  # of the image encoder


class OwnNumbers(NamedTuple):
    """The domain's factors and settings, as they were."""

    factors: Factors
    settings: dict[str, Any]  # fields of `Domain`, and the image encoder's `features`
    has_networks: bool  # whether the checkpoint's networks were the domain's own, and not the nearest to its factors


def pack_own_numbers(domain: Domain, offsets_file: Path) -> bytes:
    """The content of the file, which belongs to `offsets_file`."""
    settings = {name: getattr(domain, name) for name in _SETTINGS} | {_FEATURES: domain.base.image_encoder.features}
    has_networks = domain.networks is not None
    header = {"kind": _KIND, "settings": settings, "weight_offsets": file_digest(offsets_file), "has_networks": has_networks}
    return pack({name: np.asarray(leaf, np.float32) for name, leaf in flatten_dict(domain.factors, sep="|").items()}, header)


def read_own_numbers(offsets_file: Path) -> OwnNumbers | None:
    """What lies beside a checkpoint's offsets; None where nothing does, or the offsets are others by now.

    Errors: `UserError` for a file that is damaged, changed, or of another version.
    """
    file = offsets_file.parent / FILE
    if not file.exists():
        return None
    tensors, header = unpack(file, _KIND, "what an exported domain brings")
    settings = header.get("settings")
    if not isinstance(settings, dict) or not set(settings) <= {*_SETTINGS, _FEATURES}:
        raise UserError(f"{file} holds settings that are unknown here; update e4t-jax.")
    if header.get("weight_offsets") != file_digest(offsets_file):
        return None
    factors = unflatten_dict({name: jnp.asarray(tensor) for name, tensor in tensors.items()}, sep="|")
    return OwnNumbers(factors, settings, header.get("has_networks") is True)
