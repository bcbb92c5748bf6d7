"""Measures personalisation on held-out identities of the drawn world, the user's way: bare picture files, default settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from e4t_jax.checks import Concepts, Guidance, SamplingSteps, Whole
from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import progress
from e4t_jax.cli.run import Inline, NetworkCommand
from e4t_jax.creatures.judging.evaluation_report import evaluate, write_evaluation
from e4t_jax.creatures.judging.judges import load_judges
from e4t_jax.errors import UserError
from e4t_jax.files.domain_files import load_domain
from e4t_jax.files.reports import drawing_settings
from e4t_jax.sample import SampleSettings
from e4t_jax.storage import check_writable
from e4t_jax.tuning.tune import TuneSettings

_KEPT = ("domain", "concepts", "prompts", "given", "pictures", "sampling_steps", "split")  # in metrics.json, beside those of tuning


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Tune held-out identities from one picture each, draw them in other scenes, and let the judges decide."""

    example = "e4t evaluate --concepts 64 --seed 0 --out outputs/evaluate"

    out: Path = Path("outputs/evaluate")
    """Folder for metrics.json, report.md, grid.png and the concept files."""
    domain: str = "creatures"
    """Domain: "creatures", or a folder that `e4t pretrain` wrote on the creatures' base, of creatures or of fish."""
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
    domain = load_domain(config.domain, **config.policy())
    drawing = SampleSettings(config.tuning.seed, config.sampling_steps, config.guidance)
    try:
        domain.sampler(drawing)  # says what is wrong with its steps before minutes of tuning
    except UserError as error:
        raise UserError(error.message, "sampling_steps") from None
    evaluation = evaluate(
        domain,
        load_judges(),
        config.out,
        config.tuning,
        drawing,
        concepts=config.concepts,
        prompts=config.prompts,
        inputs=config.given,
        pictures=config.pictures,
        split=config.split,
        bars=lambda name: partial(progress, description=name),
    )
    used = config.tuning.used(config.tuning.recipe_of(domain.regularisation))
    drawn = drawing_settings(domain, drawing)
    settings = {name: getattr(config, name) for name in _KEPT} | {name: drawn[name] for name in ("guidance", "sampling")} | used
    write_evaluation(config.out, evaluation, settings)
    print(json.dumps(evaluation.metrics, indent=2))
