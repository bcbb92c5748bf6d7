"""The whole method in one go: held-out creatures, one picture each, five steps, new scenes; writes a grid to look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from e4t_jax.checks import Concepts, SamplingSteps, Seed, TuningSteps
from e4t_jax.cli.shared import Command, progress, use_all_cores
from e4t_jax.creatures.judging.judge_losses import validate_judges
from e4t_jax.creatures.judging.judges import load_judges
from e4t_jax.creatures.judging.personalisation_trial import held_out, judge_pictures, personalise
from e4t_jax.data.grids import picture_grid, side_by_side
from e4t_jax.data.images import encode_png
from e4t_jax.files.domain_files import load_domain
from e4t_jax.sample import SampleSettings
from e4t_jax.storage import check_writable, to_json, write_files
from e4t_jax.tuning.tune import TuneSettings

_SCALE = 3  # of the pictures in the grid


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
    domain, judges = load_domain("creatures"), load_judges()
    trial = held_out(config.seed, config.concepts)
    untuned, _ = personalise(domain, trial, config.out / "untuned", TuneSettings(steps=0))
    tuned, costs = personalise(
        domain, trial, config.out, TuneSettings(steps=config.steps), track=partial(progress, description="tuning")
    )
    drawing = SampleSettings(config.seed, config.sampling_steps)
    name = f"{config.steps} steps"
    before = domain.generate(untuned, trial.prompts, drawing, track=partial(progress, description="drawing, 0 steps"))
    after = domain.generate(tuned, trial.prompts, drawing, track=partial(progress, description=f"drawing, {name}"))
    class_alone = domain.generate_class(config.concepts, trial.prompts, drawing)

    columns = [trial.truth, class_alone, before, after]
    grids = []
    for index, prompt in enumerate(trial.prompts):
        rows = [[trial.pictures[row], *(column[row, index] for column in columns)] for row in range(config.concepts)]
        grids.append(picture_grid(rows, titles=["given", "true", "base", "0 steps", name], heading=prompt, scale=_SCALE))
    metrics = {
        **judge_pictures(domain, judges, trial, after),
        **costs,  # compilation included
        **validate_judges(judges, config.seed),
        "zero_steps": judge_pictures(domain, judges, trial, before),
        "class_alone": judge_pictures(domain, judges, trial, class_alone),
        "prompts": trial.prompts,
    }
    write_files({config.out / "grid.png": encode_png(side_by_side(grids)), config.out / "metrics.json": to_json(metrics)})
    print("\n".join(f"{index}. {prompt}" for index, prompt in enumerate(trial.prompts, 1)))
    print(f"Pictures: {config.out / 'grid.png'}\nMetrics:  {config.out / 'metrics.json'}\nConcepts: {config.out / 'concepts'}")
