"""Personalisation of held-out identities, measured by the judges: figures, a report and a grid of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from e4t_jax.creatures.judging.judge_losses import validate_judges
from e4t_jax.creatures.judging.personalisation_trial import Inputs, Trial, held_out, judge_pictures, tune_trial
from e4t_jax.data.grids import picture_grid
from e4t_jax.data.images import encode_png
from e4t_jax.domain import Domain, Track
from e4t_jax.sample import SampleSettings
from e4t_jax.storage import to_json, write_files
from e4t_jax.tuning.tune import TuneSettings

_SHOWN = 16  # rows of the report's grid
Bars = Callable[[str], Track]  # what a loop is -> what wraps it


class Evaluation(NamedTuple):
    """One trial, the pictures drawn for it, and every figure."""

    trial: Trial
    images: UInt8[np.ndarray, "concepts prompts h w 3"]
    metrics: dict[str, Any]


def evaluate(
    domain: Domain,
    judges: dict[str, Any],
    folder: Path,
    tuning: TuneSettings,
    drawing: SampleSettings,
    *,
    concepts: int = 64,
    prompts: int = 4,
    inputs: Inputs = "picture",
    pictures: Literal["photo", "any", "both"] = "both",
    split: str = "test",
    bars: Bars = lambda name: iter,
) -> Evaluation:
    """Tunes `concepts` held-out identities from one picture each, draws them in `prompts` other scenes, and judges the pictures.

    The seed of `tuning` is that of the identities and their pictures, too. Of `pictures` "both", the trial is that of photos; the
    figures of pictures in any style are `metrics["any_style"]`. Pictures and concept files are written to `folder`.

    Errors: `UserError` for a domain of a class that no judge tells apart, and as `Domain.tune` and `Domain.generate`.
    """
    seed = tuning.seed
    ask = partial(held_out, seed, concepts, prompts, split=split, kind=domain.domain_token)
    measure = partial(_measure, domain, judges, tuning=tuning, drawing=drawing, inputs=inputs, bars=bars)
    trial = ask(any_style=pictures == "any")
    images, metrics = measure(trial, folder, warm=True)
    if pictures == "both":
        _, metrics["any_style"] = measure(ask(any_style=True), folder / "any_style", warm=False)
    class_alone = domain.generate_class(concepts, trial.prompts, drawing)
    metrics["class_identity_top1"] = judge_pictures(domain, judges, trial, class_alone)["identity_top1"]
    metrics |= validate_judges(judges, seed, kind=trial.kind)
    return Evaluation(trial, images, metrics)


def write_evaluation(folder: Path, evaluation: Evaluation, settings: Mapping[str, Any]) -> None:
    """Writes metrics.json, report.md and grid.png; `settings` are kept beside the figures.

    Errors: `UserError` when they cannot be written.
    """
    trial, images, metrics = evaluation
    rows = [
        [trial.pictures[row], *(picture for pair in zip(trial.truth[row], images[row], strict=True) for picture in pair)]
        for row in range(min(_SHOWN, len(images)))
    ]
    titles = ["given", *(title for index in range(images.shape[1]) for title in (f"true {index + 1}", f"drawn {index + 1}"))]
    write_files(
        {
            folder / "grid.png": encode_png(picture_grid(rows, titles=titles, side=3 * images.shape[2])),
            folder / "report.md": report(settings, trial.prompts, metrics),
            folder / "metrics.json": to_json({**metrics, "settings": settings}),
        }
    )


def report(settings: Mapping[str, Any], prompts: Sequence[str], metrics: Mapping[str, Any]) -> str:
    """The measurement as Markdown."""
    lines = ["# Personalisation of held-out identities", "", ", ".join(f"{name} {value}" for name, value in settings.items()), ""]
    lines += [f"{index}. {prompt}" for index, prompt in enumerate(prompts, 1)]
    lines += ["", "| metric | value |", "| --- | --- |", *(f"| {name} | {value:.4g} |" for name, value in flat(metrics))]
    return "\n".join(lines) + "\n\n![the first identities: given, true and drawn](grid.png)\n"


def flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of every number, nested names joined by a dot."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _measure(
    domain: Domain,
    judges: dict[str, Any],
    trial: Trial,
    folder: Path,
    *,
    tuning: TuneSettings,
    drawing: SampleSettings,
    inputs: Inputs,
    warm: bool,
    bars: Bars,
) -> tuple[np.ndarray, dict[str, Any]]:
    """The pictures drawn for a trial, and its figures."""
    concepts, costs = tune_trial(domain, trial, folder, tuning, inputs=inputs, warm=warm, track=bars("tuning"))
    images = domain.generate(concepts, trial.prompts, drawing, track=bars("drawing"))
    return images, {**judge_pictures(domain, judges, trial, images), **costs}
