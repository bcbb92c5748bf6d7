"""Measures personalisation on held-out identities of the drawn world, the user's way: bare picture files, default settings.

python -m infer.evaluate --domain creatures --concepts 64 --seed 0 --steps 5 --out DIR
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from e4t_jax.data.images import encode_png, picture_grid
from e4t_jax.domain import Domain, load_domain
from e4t_jax.errors import UserError
from e4t_jax.evaluation.judge_training import validate_judges
from e4t_jax.evaluation.judges import load_judges
from e4t_jax.evaluation.trial import Trial, held_out, judge_pictures, personalise, true_pictures
from e4t_jax.writing import check_writable, write_file
from train.command import Command, progress, run

_SHOWN = 16  # rows of the report's grid


@dataclass(frozen=True)
class Config(Command):
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
    given: Literal["picture", "mask", "caption", "both"] = "picture"
    """What tuning is told: the bare picture, as a user's; the others, with the true mask or caption, are for diagnosis."""
    pictures: Literal["photo", "any", "both"] = "both"
    """The pictures given are photos, or in any style, or one after the other (any_style in metrics.json)."""
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
    ask = partial(held_out, config.seed, config.concepts, config.prompts, split=config.split)
    trial = ask(any_style=config.pictures == "any")
    metrics, images = measure(config, domain, judges, trial, config.out)
    if config.pictures == "both":
        metrics["any_style"], _ = measure(config, domain, judges, ask(any_style=True), config.out / "any_style")
    class_alone = domain.generate_class(config.concepts, trial.prompts, **drawing(config))
    metrics["class_identity_top1"] = judge_pictures(domain, judges, trial, class_alone)["identity_top1"]
    metrics |= validate_judges(judges, config.seed)
    shown = ("domain", "concepts", "prompts", "seed", "steps", "scope", "given", "pictures", "guidance", "split")
    facts = {name: getattr(config, name) for name in shown}
    write_file(config.out / "metrics.json", json.dumps({**metrics, "settings": facts}, indent=2) + "\n")
    write_file(config.out / "report.md", report(facts, trial.prompts, metrics))
    truth = true_pictures(trial)
    rows = [
        [trial.pictures[row], *(picture for pair in zip(truth[row], images[row], strict=True) for picture in pair)]
        for row in range(min(_SHOWN, config.concepts))
    ]
    titles = ["given", *(title for index in range(config.prompts) for title in (f"true {index + 1}", f"drawn {index + 1}"))]
    write_file(config.out / "grid.png", encode_png(picture_grid(rows, titles=titles, scale=3)))
    print(json.dumps(metrics, indent=2))


def drawing(config: Config) -> dict[str, Any]:
    """How pictures are drawn."""
    return {"seed": config.seed, "steps": config.sampling_steps, "guidance": config.guidance}


def measure(config: Config, domain: Domain, judges: dict, trial: Trial, folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Tunes and draws one trial; its metrics and pictures."""
    concepts, costs = personalise(
        domain,
        trial,
        folder,
        given=config.given,
        warm=folder == config.out,
        steps=config.steps,
        scope=config.scope,
        learning_rate=config.learning_rate,
        word_rate=config.word_rate,
        track=partial(progress, description="tuning"),
    )
    images = domain.generate(concepts, trial.prompts, **drawing(config), track=partial(progress, description="drawing"))
    return {**judge_pictures(domain, judges, trial, images), **costs}, images


def report(facts: dict, prompts: list[str], metrics: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    lines = ["# Personalisation of held-out identities", "", ", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += [f"{index}. {prompt}" for index, prompt in enumerate(prompts, 1)]
    lines += ["", "| metric | value |", "| --- | --- |", *(f"| {name} | {value:.4g} |" for name, value in flat(metrics))]
    return "\n".join(lines) + "\n\n![the first identities: given, true and drawn](grid.png)\n"


def flat(metrics: dict[str, Any], prefix: str = ""):
    """(name, value) of every number, nested names joined by a dot."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


if __name__ == "__main__":
    run(main)
