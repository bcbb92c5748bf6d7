"""Personalises a domain from pictures: one concept a picture, some dozen tuned in one compiled call."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from e4t_jax.cli.shared import Command, Inline, progress
from e4t_jax.concept import save_concept
from e4t_jax.domain_files import load_domain
from e4t_jax.errors import UserError
from e4t_jax.storage import check_writable, to_json, write_file
from e4t_jax.training.tune import TuneSettings


@dataclass(frozen=True)
class Config(Command):
    """Tune one concept for each picture; writes a .safetensors file a concept and tune.json."""

    images: tuple[Path, ...]
    """Pictures, one a concept."""
    out: Path
    """Folder for the concept files."""
    domain: str = "creatures"
    """Domain: "creatures", or a folder that train.pretrain wrote."""
    caption: str | None = None
    """What all the pictures show around *s ("a photo of *s in a meadow"); where not given, it is read off each picture."""
    tuning: Annotated[TuneSettings, Inline] = TuneSettings()


def main(config: Config) -> None:
    names = [path.stem for path in config.images]
    if len(set(names)) < len(names):
        raise UserError("two files have one name, and concepts are named after their files; rename one.", "images")
    check_writable(config.out)
    domain = load_domain(config.domain)
    began = time.perf_counter()
    concepts = domain.tune(config.images, config.tuning, caption=config.caption, track=partial(progress, description="tuning"))
    seconds = time.perf_counter() - began
    sizes = {concept.name: save_concept(config.out / f"{concept.name}.safetensors", concept) for concept in concepts}
    facts = {
        "domain": config.domain,
        **dataclasses.asdict(config.tuning),
        "caption": config.caption,
        "seconds": round(seconds, 3),  # compilation included
        "bytes_per_concept": sizes,
    }
    write_file(config.out / "tune.json", to_json(facts))
    print(f"Wrote {len(concepts)} concepts to {config.out} ({seconds:.1f} s, compilation included)")
