"""Measures personalisation on held-out identities of the drawn world.

python -m infer.evaluate --domain creatures --concepts 64 --seed 0 --steps 5 --out DIR
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from e4t_jax.concept import save_concept
from e4t_jax.data.images import encode_png, picture_grid
from e4t_jax.domain import load_domain
from e4t_jax.errors import UserError
from e4t_jax.evaluation.judge_training import validate_judges
from e4t_jax.evaluation.judges import load_judges
from e4t_jax.evaluation.trial import draw_trial, held_out, judge_pictures, true_pictures, tune_trial
from e4t_jax.writing import check_writable, write_file
from train.command import progress, run

_SHOWN = 16  # rows of the report's grid


@dataclass(frozen=True)
class Config:
    """Tune held-out identities from one picture each, draw them in other scenes, and let the judges decide."""

    out: Path = Path("outputs/evaluate")
    """Folder for metrics.json, report.md, grid.png and the concept files."""
    domain: str = "creatures"
    """Domain: "creatures", or a folder of train.pretrain on the creatures' base."""
    concepts: int = 64
    """Number of held-out identities."""
    prompts: int = 4
    """Prompts for each of them: contexts and styles that the picture given does not show."""
    seed: int = 0
    """Seed of the identities, their pictures, the prompts and the noise."""
    steps: int = 5
    """Tuning steps; 0 is the encoder alone."""
    scope: str = "compact"
    """What is tuned: compact, head or full."""
    learning_rate: float | None = None
    """Learning rate of tuning; the scope's own where not given."""
    word_rate: float | None = None
    """Learning rate of the word itself in scope compact."""
    sampling_steps: int = 25
    """Steps of the sampler."""
    guidance: float | None = None
    """Classifier-free guidance; the domain's own where not given."""
    split: Literal["test", "validation"] = "test"
    """Whose identities; choose settings on validation only."""


def main(config: Config) -> None:
    if config.concepts < 1 or config.prompts < 1:
        raise UserError("--concepts and --prompts must be 1 or more.")
    check_writable(config.out)
    domain, judges = load_domain(config.domain), load_judges()
    trial = held_out(config.seed, config.concepts, config.prompts, split=config.split)
    concepts, seconds = tune_trial(
        domain,
        trial,
        steps=config.steps,
        scope=config.scope,
        learning_rate=config.learning_rate,
        word_rate=config.word_rate,
        track=partial(progress, description="tuning"),
    )
    options = {"seed": config.seed, "steps": config.sampling_steps, "guidance": config.guidance}
    images = draw_trial(domain, trial, concepts, track=partial(progress, description="drawing"), **options)
    class_alone = domain.generate_class(config.concepts, trial.prompts, **options)
    sizes = [save_concept(config.out / "concepts" / f"{concept.name}.safetensors", concept) for concept in concepts]
    metrics = {
        **judge_pictures(domain, judges, trial, images),
        "seconds_per_concept": seconds,
        "bytes_per_concept": int(np.median(sizes)),
        **validate_judges(judges, config.seed),
        "class_identity_top1": judge_pictures(domain, judges, trial, class_alone)["identity_top1"],
    }
    facts = {
        name: getattr(config, name) for name in ("domain", "concepts", "prompts", "seed", "steps", "scope", "guidance", "split")
    }
    write_file(config.out / "metrics.json", json.dumps({**metrics, "settings": facts}, indent=2) + "\n")
    write_file(config.out / "report.md", report(facts, trial.prompts, metrics))
    truth = true_pictures(trial)
    rows = [
        [trial.pictures[row], *(picture for pair in zip(truth[row], images[row], strict=True) for picture in pair)]
        for row in range(min(_SHOWN, config.concepts))
    ]
    titles = ["given", *(title for index in range(config.prompts) for title in (f"true {index + 1}", f"drawn {index + 1}"))]
    write_file(config.out / "grid.png", encode_png(picture_grid(rows, titles=titles, scale=2)))
    print(json.dumps(metrics, indent=2))


def report(facts: dict, prompts: list[str], metrics: dict[str, float]) -> str:
    """The measurement as Markdown."""
    lines = ["# Personalisation of held-out identities", "", ", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += [f"{index}. {prompt}" for index, prompt in enumerate(prompts, 1)]
    lines += ["", "| metric | value |", "| --- | --- |", *(f"| {name} | {value:.4g} |" for name, value in metrics.items())]
    return "\n".join(lines) + "\n\n![the first identities: given, true and drawn](grid.png)\n"


if __name__ == "__main__":
    run(main)
