"""Measures personalisation on held-out identities of the drawn world, the user's way: bare picture files, default settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from e4t_jax.checks import Concepts, Guidance, SamplingSteps, Whole
from e4t_jax.cli.shared import Inline, NetworkCommand, progress, use_all_cores
from e4t_jax.creatures.judging.judge_losses import validate_judges
from e4t_jax.creatures.judging.judges import load_judges
from e4t_jax.creatures.judging.personalisation_trial import Trial, held_out, judge_pictures, personalise
from e4t_jax.data.grids import picture_grid
from e4t_jax.data.images import encode_png
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.files.domain_files import load_domain
from e4t_jax.sample import SampleSettings
from e4t_jax.storage import check_writable, to_json, write_files
from e4t_jax.tuning.tune import TuneSettings

_SHOWN = 16  # rows of the report's grid


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Tune held-out identities from one picture each, draw them in other scenes, and let the judges decide."""

    out: Path = Path("outputs/evaluate")
    """Folder for metrics.json, report.md, grid.png and the concept files."""
    domain: str = "creatures"
    """Domain: "creatures", or a folder of train.pretrain on the creatures' base, of creatures or of fish."""
    concepts: Concepts = 64
    """Number of held-out identities."""
    prompts: Annotated[int, Whole(1, 1000)] = 4
    """Prompts for each of them: contexts and styles that the picture given does not show."""
    given: Literal["picture", "mask", "caption", "both"] = "picture"
    """What tuning is told: the bare picture, as a user's; the others, with the true mask or caption, are for diagnosis."""
    pictures: Literal["photo", "any", "both"] = "both"
    """The pictures given are photos, or in any style, or one after the other (any_style in metrics.json)."""
    sampling_steps: SamplingSteps = 25
    """Steps of the sampler."""
    guidance: Guidance | None = None
    """Classifier-free guidance; the domain's own where not given."""
    split: Literal["test", "validation"] = "test"
    """Whose identities; choose settings on validation only."""
    tuning: Annotated[TuneSettings, Inline] = TuneSettings()
    """Its seed is that of the identities, their pictures, the prompts and the noise, too."""


def main(config: Config) -> None:
    use_all_cores()
    check_writable(config.out)
    domain, seed = load_domain(config.domain, dtype=config.dtype), config.tuning.seed
    drawing = SampleSettings(seed, config.sampling_steps, config.guidance)
    try:
        domain.sampler(drawing)  # says what is wrong with its steps before minutes of tuning
    except UserError as error:
        raise UserError(error.message, "sampling_steps") from None
    judges = load_judges()
    ask = partial(held_out, seed, config.concepts, config.prompts, split=config.split, kind=domain.domain_token)
    trial = ask(any_style=config.pictures == "any")
    metrics, images = measure(config, domain, judges, trial, drawing, config.out)
    if config.pictures == "both":
        metrics["any_style"], _ = measure(config, domain, judges, ask(any_style=True), drawing, config.out / "any_style")
    class_alone = domain.generate_class(config.concepts, trial.prompts, drawing)
    metrics["class_identity_top1"] = judge_pictures(domain, judges, trial, class_alone)["identity_top1"]
    metrics |= validate_judges(judges, seed, kind=trial.kind)
    shown = ("domain", "concepts", "prompts", "given", "pictures", "guidance", "split")
    facts = {name: getattr(config, name) for name in shown} | dataclasses.asdict(config.tuning)
    rows = [
        [trial.pictures[row], *(picture for pair in zip(trial.truth[row], images[row], strict=True) for picture in pair)]
        for row in range(min(_SHOWN, config.concepts))
    ]
    titles = ["given", *(title for index in range(config.prompts) for title in (f"true {index + 1}", f"drawn {index + 1}"))]
    write_files(
        {
            config.out / "grid.png": encode_png(picture_grid(rows, titles=titles, scale=3)),
            config.out / "report.md": report(facts, trial.prompts, metrics),
            config.out / "metrics.json": to_json({**metrics, "settings": facts}),
        }
    )
    print(json.dumps(metrics, indent=2))


def measure(
    config: Config, domain: Domain, judges: dict, trial: Trial, drawing: SampleSettings, folder: Path
) -> tuple[dict[str, Any], np.ndarray]:
    """Tunes and draws one trial; its metrics and pictures."""
    tuning, warm = partial(progress, description="tuning"), folder == config.out
    concepts, costs = personalise(domain, trial, folder, config.tuning, given=config.given, warm=warm, track=tuning)
    images = domain.generate(concepts, trial.prompts, drawing, track=partial(progress, description="drawing"))
    return {**judge_pictures(domain, judges, trial, images), **costs}, images


def report(facts: dict, prompts: list[str], metrics: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    lines = ["# Personalisation of held-out identities", "", ", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += [f"{index}. {prompt}" for index, prompt in enumerate(prompts, 1)]
    lines += ["", "| metric | value |", "| --- | --- |", *(f"| {name} | {value:.4g} |" for name, value in flat(metrics))]
    return "\n".join(lines) + "\n\n![the first identities: given, true and drawn](grid.png)\n"


def flat(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of every number, nested names joined by a dot."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
