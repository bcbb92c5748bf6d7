"""Draws personalised concepts in new scenes.

python -m infer.generate --concepts DIR/venus.safetensors --prompts "a photo of *s in the snow" --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from e4t_jax.concept import load_concept
from e4t_jax.data.images import encode_png, picture_grid
from e4t_jax.domain import load_domain
from e4t_jax.writing import check_writable, write_file
from train.command import Command, progress, run


@dataclass(frozen=True)
class Config(Command):
    """Draw every concept in every prompt; writes CONCEPT_PROMPT.png files and grid.png (a row a concept)."""

    concepts: tuple[Path, ...]
    """Concept files that train.tune wrote."""
    prompts: tuple[str, ...]
    """Prompts with *s where the concept goes."""
    out: Path
    """Folder for the pictures."""
    domain: str = "creatures"
    """The domain that the concepts were tuned in."""
    seed: int = 0
    """Seed of the noise."""
    steps: int = 25
    """Sampling steps."""
    guidance: float | None = None
    """Classifier-free guidance, 1 is none; the domain's own where not given."""
    sampling: str | None = None
    """Sampler: ddim, dpm++2m, pndm, euler or euler-ancestral; the base's own where not given."""


def main(config: Config) -> None:
    check_writable(config.out)
    domain = load_domain(config.domain)
    concepts = [load_concept(path, domain.fingerprint) for path in config.concepts]
    images = domain.generate(
        concepts,
        config.prompts,
        seed=config.seed,
        steps=config.steps,
        guidance=config.guidance,
        sampling=config.sampling,
        track=partial(progress, description="drawing"),
    )
    for concept, row in zip(concepts, images, strict=True):
        for index, image in enumerate(row):
            write_file(config.out / f"{concept.name}_{index}.png", encode_png(image))
    write_file(config.out / "grid.png", encode_png(picture_grid([list(row) for row in images])))
    print(f"Wrote {images.shape[0] * images.shape[1]} pictures and grid.png to {config.out}")


if __name__ == "__main__":
    run(main)
