"""The whole method in one go: held-out creatures, one picture each, five steps, new scenes; writes a grid to look at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from e4t_jax.concept import save_concept
from e4t_jax.data.images import encode_png, picture_grid
from e4t_jax.domain import load_domain
from e4t_jax.evaluation.judge_training import validate_judges
from e4t_jax.evaluation.judges import load_judges
from e4t_jax.evaluation.trial import draw_trial, held_out, judge_pictures, true_pictures, tune_trial
from e4t_jax.writing import check_writable, write_file
from train.command import progress, run


@dataclass(frozen=True)
class Config:
    """Tune six creatures that the domain has never seen from one picture each, and draw them in four new scenes."""

    out: Path = Path("outputs/demo")
    """Folder for grid.png, metrics.json and the concept files."""
    concepts: int = 6
    """Number of held-out identities."""
    steps: int = 5
    """Tuning steps."""
    sampling_steps: int = 25
    """Steps of the sampler."""
    seed: int = 7
    """Seed of the identities, their pictures, the prompts and the noise."""


def main(config: Config) -> None:
    check_writable(config.out)
    domain, judges = load_domain("creatures"), load_judges()
    trial = held_out(config.seed, config.concepts)
    untuned, _ = tune_trial(domain, trial, steps=0, scope="compact")
    tuned, seconds = tune_trial(domain, trial, steps=config.steps, scope="compact", track=partial(progress, description="tuning"))
    options = {"seed": config.seed, "steps": config.sampling_steps}
    before = draw_trial(domain, trial, untuned, track=partial(progress, description="drawing, 0 steps"), **options)
    title = f"{config.steps} steps"
    after = draw_trial(domain, trial, tuned, track=partial(progress, description=f"drawing, {title}"), **options)
    class_alone = domain.generate_class(config.concepts, trial.prompts, **options)
    sizes = [save_concept(config.out / f"{concept.name}.safetensors", concept) for concept in tuned]
    for name, picture in zip((concept.name for concept in tuned), trial.pictures, strict=True):
        write_file(config.out / f"{name}.png", encode_png(picture))

    truth = true_pictures(trial)
    shown = [truth, class_alone, before, after]
    rows = [
        [trial.pictures[row], *(each[row, column] for column in range(len(trial.prompts)) for each in shown)]
        for row in range(config.concepts)
    ]
    titles = ["given", *(name for _ in trial.prompts for name in ("true", "class", "0 steps", title))]
    write_file(config.out / "grid.png", encode_png(picture_grid(rows, titles=titles, scale=2)))
    metrics = {
        **judge_pictures(domain, judges, trial, after),
        "seconds_per_concept": seconds,
        "bytes_per_concept": int(np.median(sizes)),
        **validate_judges(judges, config.seed),
        "zero_steps": judge_pictures(domain, judges, trial, before),
        "class_alone": judge_pictures(domain, judges, trial, class_alone),
        "prompts": trial.prompts,
    }
    write_file(config.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print("\n".join(f"{index}. {prompt}" for index, prompt in enumerate(trial.prompts, 1)))
    print(f"Pictures: {config.out / 'grid.png'}\nMetrics:  {config.out / 'metrics.json'}\nConcepts: {config.out}/*.safetensors")


if __name__ == "__main__":
    run(main)
