"""Where the embedded world's trained files lie."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def base_folder() -> Path:
    """The base model, a diffusers folder."""
    return ASSETS / "base"


def domain_folder() -> Path:
    """The pretrained domain "creatures"."""
    return ASSETS / "creatures"
