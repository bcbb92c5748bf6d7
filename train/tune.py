"""Personalises a domain from pictures: one concept a picture, all tuned in one compiled call.

python -m train.tune --domain creatures --images venus.png ada.png --steps 5 --out DIR
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from e4t_jax.concept import save_concept
from e4t_jax.domain import load_domain
from e4t_jax.errors import UserError
from e4t_jax.writing import check_writable, write_file
from train.command import Command, progress, run


@dataclass(frozen=True)
class Config(Command):
    """Tune one concept for each picture; writes a .safetensors file a concept and tune.json."""

    images: tuple[Path, ...]
    """Pictures, one a concept."""
    out: Path
    """Folder for the concept files."""
    domain: str = "creatures"
    """Domain: "creatures", or a folder that train.pretrain wrote."""
    steps: int = 5
    """Tuning steps; 0 uses the encoder alone."""
    scope: str = "compact"
    """What is tuned: compact (kilobytes), head (the encoder too) or full (all U-Net weights too)."""
    mask: Literal["auto", "none", "file"] = "auto"
    """What limits the loss to the concept: an alpha channel or NAME.mask.png beside a picture where there is one (auto), or
    in any case (file), or nothing (none)."""
    caption: str | None = None
    """What all the pictures show around *s ("a photo of *s in a meadow"); where not given, it is read off each picture."""
    seed: int = 0
    """Seed of views, noise and timesteps."""


def main(config: Config) -> None:
    names = [path.stem for path in config.images]
    if len(set(names)) < len(names):
        raise UserError("--images holds two files of one name, and concepts are named after their files; rename one.")
    check_writable(config.out)
    domain = load_domain(config.domain)
    began = time.perf_counter()
    concepts = domain.tune(
        config.images,
        steps=config.steps,
        scope=config.scope,
        seed=config.seed,
        caption=config.caption,
        mask=config.mask,
        track=partial(progress, description="tuning"),
    )
    seconds = time.perf_counter() - began
    sizes = {concept.name: save_concept(config.out / f"{concept.name}.safetensors", concept) for concept in concepts}
    facts = {
        "domain": config.domain,
        "steps": config.steps,
        "scope": config.scope,
        "seed": config.seed,
        "mask": config.mask,
        "caption": config.caption,
        "seconds": round(seconds, 3),  # compilation included
        "bytes_per_concept": sizes,
    }
    write_file(config.out / "tune.json", json.dumps(facts, indent=2) + "\n")
    print(f"Wrote {len(concepts)} concepts to {config.out} ({seconds:.1f} s, compilation included)")


if __name__ == "__main__":
    run(main)
