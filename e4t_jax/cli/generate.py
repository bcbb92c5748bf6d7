"""Draws personalised concepts in new scenes."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import progress, raise_failures
from e4t_jax.cli.run import Inline, NetworkCommand
from e4t_jax.data.images import encode_png
from e4t_jax.files.domain_files import load_domain
from e4t_jax.files.reports import drawing_grid, drawing_report
from e4t_jax.files.resumable import check_drawing, draw_to_files
from e4t_jax.sample import SampleSettings
from e4t_jax.storage import check_writable, to_json, write_files
from e4t_jax.training.processes import Processes, is_first, joined, own_file
from e4t_jax.words import other_syntax

_ROWS = 64  # of the grid


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Draw every concept in every prompt.

    It writes CONCEPT_0.png, CONCEPT_1.png … in the order of the prompts, as they come; generate.json, which says which is which;
    and grid.png, of the first 64 concepts.
    """

    example = 'e4t generate --concepts outputs/tuned/venus.safetensors --prompts "a photo of *s in the snow" --out outputs/drawn'

    concepts: tuple[Path, ...]
    """Concept files that `e4t tune` wrote."""
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
    check_drawing(config.concepts, config.prompts)
    check_writable(config.out)
    foreign = other_syntax(config.prompts)
    if foreign is not None and is_first():
        warnings.warn(f"weights, schedules and files in prompts are not read: {foreign} is plain text here.", stacklevel=1)
    domain = load_domain(config.domain, **config.policy())
    bar = partial(progress, description="drawing", unit="concept", disable=not is_first())
    drawn = draw_to_files(domain, config.concepts, config.prompts, config.out, config.drawing, resume=config.resume, track=bar)
    if drawn.files:
        shown = dict(itertools.islice(drawn.files.items(), _ROWS))
        report = {
            "domain": config.domain,
            **drawing_report(domain, config.drawing, config.prompts, drawn.files, config.concepts),
            "failed": {name: str(error) for name, error in drawn.failed.items()},
        }
        grid = drawing_grid(domain, config.prompts, shown, config.concepts)
        write_files({own_file(config.out / "grid.png"): encode_png(grid), own_file(config.out / "generate.json"): to_json(report)})
        print(f"Wrote {drawn.drawn * len(config.prompts)} pictures and a grid of them to {config.out}")
    raise_failures(drawn.failed, drawn.asked, "concepts")
