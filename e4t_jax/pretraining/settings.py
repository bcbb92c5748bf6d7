"""What a domain is, and the settings that come with data or with a base where none are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from e4t_jax import registry
from e4t_jax.bases import LoadedBase, open_base
from e4t_jax.checks import Guidance
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.pretraining.step import PretrainSettings


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the encoder sees of a picture."""

    clip_features: str = dataclasses.field(default="layers", kw_only=True)
    """What of CLIP's the encoder sees: layers, the class tokens of every second layer (the paper's), or tokens, the last layer's
    patch tokens too."""

    def open(self, base: str, image_encoder: str | None, policy: Mapping[str, Any] | None) -> LoadedBase:
        """A base that sees so; `UserError` as `bases.open_base`."""
        return open_base(base, image_encoder, clip_features=self.clip_features, **(policy or {}))


@dataclasses.dataclass(frozen=True)
class DomainSettings(Seen):
    """What a domain is, on its base; kept in domain.json."""

    domain_token: str
    """The word that every concept of the domain is one of ("face"); one token."""
    template: str = Domain.template
    """Prompts for pictures without captions, and captions to look for in tuning: neutral, object, face, art or creature."""
    guidance: Guidance = Domain.guidance
    """Classifier-free guidance to draw this domain with where a call names none."""


class Preset(NamedTuple):
    """Settings that fit some data or a base: those of the domain, and of pretraining it."""

    name: str
    domain: DomainSettings
    training: PretrainSettings


def preset_of(base: str, data: str) -> Preset | None:
    """The preset that comes with the data or else with the base; None where neither has one."""
    for name in (data, base):
        found = registry.find("preset", name)
        if found is not None:
            return found()
    return None


def or_preset(
    base: str, data: str, domain: DomainSettings | None, training: PretrainSettings | None
) -> tuple[DomainSettings, PretrainSettings, str | None]:
    """The settings given, with those of the preset, or else the library's, in the place of what is None; and the name of the preset
    if any of its settings were taken.

    Errors: `UserError` where no domain is given and no preset has one.
    """
    preset = preset_of(base, data) if domain is None or training is None else None
    if preset is not None:
        return domain or preset.domain, training or preset.training, preset.name
    if domain is None:
        raise UserError('there is none; give the word that every concept of the domain is one of, such as "face".', "domain_token")
    return domain, training or PretrainSettings(), None
