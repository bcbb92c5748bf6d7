"""Draws personalised concepts in new scenes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from e4t_jax.cli.shared import Inline, NetworkCommand, names_of, progress
from e4t_jax.concept import load_concept
from e4t_jax.data.images import encode_png, picture_grid
from e4t_jax.domain_files import load_domain
from e4t_jax.errors import UserError
from e4t_jax.sample import SampleSettings
from e4t_jax.storage import check_writable, write_files


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Draw every concept in every prompt; writes CONCEPT_PROMPT.png files and grid.png (a row a concept)."""

    concepts: tuple[Path, ...]
    """Concept files that train.tune wrote."""
    prompts: tuple[str, ...]
    """Prompts with *s where the concept goes."""
    out: Path
    """Folder for the pictures."""
    domain: str = "creatures"
    """The domain that the concepts were tuned in."""
    drawing: Annotated[SampleSettings, Inline] = SampleSettings()


def main(config: Config) -> None:
    empty = "there is none; give one or more files that tuning wrote."
    names_of(config.concepts, "concepts", empty=empty, named="pictures are named after their concepts")
    if not config.prompts:
        raise UserError("there is none; give one or more, with *s in it.", "prompts")
    check_writable(config.out)
    domain = load_domain(config.domain, dtype=config.dtype)
    concepts = [load_concept(path, domain.fingerprint) for path in config.concepts]
    images = domain.generate(concepts, config.prompts, config.drawing, track=partial(progress, description="drawing"))
    files = {
        config.out / f"{concept.name}_{index}.png": encode_png(image)
        for concept, row in zip(concepts, images, strict=True)
        for index, image in enumerate(row)
    }
    write_files({**files, config.out / "grid.png": encode_png(picture_grid([list(row) for row in images]))})
    print(f"Wrote {images.shape[0] * images.shape[1]} pictures and grid.png to {config.out}")
