"""Draws personalised concepts in new scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from e4t_jax.cli.shared import Inline, NetworkCommand, all_done, names_of, progress, use_all_cores
from e4t_jax.concept import Concept
from e4t_jax.data.grids import picture_grid
from e4t_jax.data.images import encode_png, png_origin
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.files.concept_files import load_concept
from e4t_jax.files.domain_files import load_domain
from e4t_jax.sample import SampleSettings
from e4t_jax.storage import check_writable, digest, file_digest, to_json, write_file, written_behind
from e4t_jax.training.processes import Processes, is_first, joined, own_file, share_of

_ROWS = 64  # of the grid


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Draw every concept in every prompt; writes CONCEPT_PROMPT.png files, as they come, and grid.png, of the first 64."""

    concepts: tuple[Path, ...]
    """Concept files that train.tune wrote."""
    prompts: tuple[str, ...]
    """Prompts with *s where the concept goes."""
    out: Path
    """Folder for the pictures."""
    domain: str = "creatures"
    """The domain that the concepts were tuned in."""
    resume: bool = False
    """Leave concepts out whose pictures are in --out already, whole, and drawn with the same prompts, settings and domain."""
    drawing: Annotated[SampleSettings, Inline] = SampleSettings()
    processes: Annotated[Processes, Inline] = Processes()


def main(config: Config) -> None:
    with joined(config.processes):
        use_all_cores()
        _generate(config)


def _generate(config: Config) -> None:
    empty = "there is none; give one or more files that tuning wrote."
    names_of(config.concepts, "concepts", empty=empty, named="pictures are named after their concepts")
    if not config.prompts:
        raise UserError("there is none; give one or more, with *s in it.", "prompts")
    check_writable(config.out)
    domain = load_domain(config.domain, **config.policy())
    # Every process of a run draws its share, and writes its own files.
    share = share_of(config.concepts)
    failed: dict[str, UserError] = {}
    origins: dict[str, str] = {}
    drawn = 0

    def files(name: str) -> list[Path]:
        return [config.out / f"{name}_{index}.png" for index in range(len(config.prompts))]

    def to_draw() -> Iterator[Concept]:
        for path in share:
            try:
                concept = load_concept(path, domain.fingerprint)
                origins[path.stem] = _origin(config, path, domain)
            except UserError as error:
                failed[path.stem] = error
                continue
            if not (config.resume and all(png_origin(file) == origins[path.stem] for file in files(path.stem))):
                yield concept

    outcomes = domain.generate_many(to_draw(), config.prompts, config.drawing, count=len(share)) if share else ()
    with written_behind() as write:
        for outcome in progress(outcomes, "drawing", unit="concept", disable=not is_first()):
            if outcome.error is not None:
                failed[outcome.name] = outcome.error
                continue
            drawn += 1
            for file, picture in zip(files(outcome.name), outcome.unwrap(), strict=True):
                write(file, encode_png(picture, origins[outcome.name]))
    shown = [path.stem for path in share if path.stem not in failed][:_ROWS]
    if shown:
        grid = picture_grid([[np.asarray(Image.open(file)) for file in files(name)] for name in shown])
        write_file(own_file(config.out / "grid.png"), encode_png(grid))
        print(f"Wrote {drawn * len(config.prompts)} pictures and a grid to {config.out}")
    all_done(failed, len(share), "concepts")


def _origin(config: Config, concept: Path, domain: Domain) -> str:
    """A checksum of all that a concept's pictures follow from."""
    facts = {
        **dataclasses.asdict(config.drawing),
        "prompts": config.prompts,
        "domain": domain.fingerprint,
        "dtype": domain.base.dtype,
    }
    return digest(to_json({**facts, "concept": file_digest(concept)}).encode())
