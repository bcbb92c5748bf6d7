"""The whole method in one go: held-out creatures, one picture each, five steps, new scenes; writes a grid to look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from e4t_jax.checks import Concepts, SamplingSteps, Seed, TuningSteps
from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import progress
from e4t_jax.cli.run import Command
from e4t_jax.creatures.judging.demonstration import demonstrate
from e4t_jax.creatures.judging.judges import load_judges
from e4t_jax.data.images import encode_png
from e4t_jax.files.domain_files import load_domain
from e4t_jax.storage import check_writable, to_json, write_files


@dataclass(frozen=True)
class Config(Command):
    """Tune six creatures that the domain has never seen from one picture each, and draw them in four new scenes."""

    out: Path = Path("outputs/demo")
    """Folder for grid.png, metrics.json, the pictures given and the concept files."""
    concepts: Concepts = 6
    """Number of held-out identities."""
    steps: TuningSteps = 5
    """Tuning steps."""
    sampling_steps: SamplingSteps = 25
    """Steps of the sampler."""
    seed: Seed = 7
    """Seed of the identities, their pictures, the prompts and the noise."""


def main(config: Config) -> None:
    use_all_cores()
    check_writable(config.out)
    shown = demonstrate(
        load_domain("creatures"),
        load_judges(),
        config.out,
        concepts=config.concepts,
        steps=config.steps,
        sampling_steps=config.sampling_steps,
        seed=config.seed,
        bars=lambda name: partial(progress, description=name),
    )
    write_files({config.out / "grid.png": encode_png(shown.grid), config.out / "metrics.json": to_json(shown.metrics)})
    print("\n".join(f"{index}. {prompt}" for index, prompt in enumerate(shown.prompts, 1)))
    print(f"Pictures: {config.out / 'grid.png'}\nMetrics:  {config.out / 'metrics.json'}\nConcepts: {config.out / 'concepts'}")
