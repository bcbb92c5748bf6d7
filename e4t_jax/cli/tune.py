"""Personalises a domain from pictures: one concept a picture, some dozen tuned in one compiled call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from e4t_jax.cli.shared import Inline, NetworkCommand, names_of, progress, say
from e4t_jax.concept import concept_bytes
from e4t_jax.data.images import is_mask, mask_beside
from e4t_jax.domain_files import check_names, load_domain
from e4t_jax.storage import check_writable, to_json, write_files
from e4t_jax.training.tune import TuneSettings


@dataclass(frozen=True)
class Config(NetworkCommand):
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
    images = pictures_of(config.images)
    names = names_of(images, "images", empty="there is no picture; give one or more.", named="concepts are named after their files")
    check_writable(config.out)
    if (config.out / "domain.json").exists():
        check_names(config.out, [f"{name}.safetensors" for name in names])
    domain = load_domain(config.domain, dtype=config.dtype)
    began = time.perf_counter()
    concepts = domain.tune(images, config.tuning, caption=config.caption, track=partial(progress, description="tuning"))
    seconds = time.perf_counter() - began
    files = {concept.name: concept_bytes(concept) for concept in concepts}
    facts = {
        "domain": config.domain,
        **dataclasses.asdict(config.tuning),
        "caption": config.caption,
        "seconds": round(seconds, 3),  # compilation included
        "bytes_per_concept": {name: len(content) for name, content in files.items()},
    }
    write_files(
        {
            **{config.out / f"{name}.safetensors": content for name, content in files.items()},
            config.out / "tune.json": to_json(facts),
        }
    )
    print(f"Wrote {len(concepts)} concepts to {config.out} ({seconds:.1f} s, compilation included)")


def pictures_of(paths: Sequence[Path]) -> list[Path]:
    """The pictures among some files: a mask that a shell's `*.png` caught with its picture is left out, and said."""
    masks = {mask_beside(path) for path in paths if not is_mask(path)}
    for path in paths:
        if path in masks:
            say(f"{path} is the mask of a picture, and no concept of its own.")
    return [path for path in paths if path not in masks]
