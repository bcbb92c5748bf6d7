"""Turns a checkpoint of the public PyTorch implementation of E4T into a domain, or into a domain and a concept.

e4t import-reference --reference HUB_ID|DIR --out DOMAIN
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from e4t_jax.cli.run import Command
from e4t_jax.interop.e4t_diffusion import import_checkpoint


@dataclass(frozen=True)
class Config(Command):
    """Import weight_offsets.pt, encoder.pt and config.json of the public PyTorch implementation (needs PyTorch)."""

    example = "e4t import-reference --reference mshing/e4t-diffusion-ffhq-celebahq-v1 --out outputs/faces"

    reference: str
    """Hub id or folder of the checkpoint; one with pretrained_args in its config.json is a tuned concept."""
    out: Path
    """Folder of the domain to write; CLIP's image encoder, where the checkpoint contains it, is kept in it."""
    base: str | None = None
    """The base model it was trained on, a Hub id or a diffusers folder; the one that its config.json names where not given."""
    revision: str | None = None
    """Of a Hub id: the branch, tag or commit to take."""
    image_encoder: str | None = None
    """CLIP's, for a checkpoint that does not contain it: Hub id or folder; OpenCLIP's ViT-H/14 where not given."""
    image: Path | None = None
    """For a tuned checkpoint: the picture it was tuned on, after which the concept is named. Where not given, domain.png beside it,
    and the concept has the name of the checkpoint's folder."""
    open_clip: Literal["before-2.23", "2.23-or-later"] = "before-2.23"
    """The version of OpenCLIP that the checkpoint was trained with: from 2.23 on it norms all tokens, before the first alone. No
    checkpoint tells; the public one for faces is older."""


def main(config: Config) -> None:
    imported = import_checkpoint(
        config.reference,
        config.base,
        config.out,
        revision=config.revision,
        image_encoder=config.image_encoder,
        image=config.image,
        open_clip=config.open_clip,
    )
    print(f"Wrote the domain {config.out}" + (f" and the concept {imported.concept.name} in it" if imported.concept else ""))
    print("\n".join(imported.notes))
