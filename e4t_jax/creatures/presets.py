"""The settings that domains of the drawn world are pretrained with."""

from __future__ import annotations

from e4t_jax.pretraining.settings import DomainSettings, Preset
from e4t_jax.pretraining.step import PretrainSettings


def creatures() -> Preset:
    """Of the data "creatures", and of anything else on its base."""
    return _preset("creatures", "creature")


def fish() -> Preset:
    """Of the data "fish"."""
    return _preset("fish", "fish")


def _preset(name: str, word: str) -> Preset:
    # On a small base that was trained on such captions, less guidance and a larger rate do than on Stable Diffusion.
    domain = DomainSettings(word, template="creature", guidance=4.0)
    return Preset(name, domain, PretrainSettings(learning_rate=1.5e-3, regularisation=0.0027))
