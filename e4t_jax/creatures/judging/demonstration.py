"""The method on a few held-out creatures: what it draws before and after tuning, beside what is true."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from e4t_jax.creatures.judging.evaluation_report import Bars
from e4t_jax.creatures.judging.judge_losses import validate_judges
from e4t_jax.creatures.judging.personalisation_trial import (
    GALLERY,
    Recognised,
    Trial,
    held_out,
    judge_pictures,
    recognise,
    tune_trial,
)
from e4t_jax.data.grids import picture_grid, side_by_side
from e4t_jax.domain import Domain
from e4t_jax.evaluation.metrics import standard_error
from e4t_jax.sample import SampleSettings
from e4t_jax.tuning.tune import TuneSettings

_SCALE = 3  # of the pictures in the grid


class Demonstration(NamedTuple):
    """A grid to look at, a block for each prompt, and the figures behind it."""

    prompts: list[str]
    grid: UInt8[np.ndarray, "height width 3"]
    metrics: dict[str, Any]


def demonstrate(
    domain: Domain,
    judges: dict[str, Any],
    folder: Path,
    *,
    concepts: int = 6,
    steps: int = 5,
    sampling_steps: int = 25,
    seed: int = 7,
    bars: Bars = lambda name: iter,
) -> Demonstration:
    """Tunes `concepts` held-out identities from one picture each and draws them in new scenes, beside the base's own pictures of
    the class, those without tuning steps and the true ones. Pictures and concept files are written to `folder`.

    Errors: `UserError` as `Domain.tune` and `Domain.generate`.
    """
    trial, drawing = held_out(seed, concepts), SampleSettings(seed, sampling_steps)
    untuned, _ = tune_trial(domain, trial, folder / "untuned", TuneSettings(steps=0))
    tuned, costs = tune_trial(domain, trial, folder, TuneSettings(steps=steps), track=bars("tuning"))
    before = domain.generate(untuned, trial.prompts, drawing, track=bars("drawing, 0 steps"))
    after = domain.generate(tuned, trial.prompts, drawing, track=bars(f"drawing, {steps} steps"))
    class_alone = domain.generate_class(concepts, trial.prompts, drawing)
    columns = {"true": trial.truth, "base": class_alone, "0 steps": before, f"{steps} steps": after}
    metrics = {
        **judge_pictures(domain, judges, trial, after),
        **costs,  # compilation included
        **validate_judges(judges, seed),
        "zero_steps": judge_pictures(domain, judges, trial, before),
        "change": change(recognise(judges, trial, before), recognise(judges, trial, after)),
        "class_alone": judge_pictures(domain, judges, trial, class_alone),
        "prompts": trial.prompts,
    }
    return Demonstration(trial.prompts, _grid(trial, list(columns), list(columns.values())), metrics)


def change(before: Recognised, after: Recognised) -> dict[str, Any]:
    """What tuning changed, picture by picture: its noise is less than that of either figure alone."""
    differences = {
        "identity_top1": after.right.astype(float) - before.right,
        "identity_similarity": after.similarity - before.similarity,
    }
    means = {name: float(values.mean()) for name, values in differences.items()}
    return {**means, "standard_errors": {name: standard_error(values) for name, values in differences.items()}}


def identity_line(metrics: Mapping[str, Any], steps: int, pictures: int) -> str:
    """The likeness to the identities given, each figure with its standard error."""
    parts = []
    for title, own in (("0 steps", metrics["zero_steps"]), (f"{steps} steps", metrics), ("difference", metrics["change"])):
        sign = "+" if title == "difference" else ""
        parts.append(f"{title} {own['identity_top1']:{sign}.3f} ± {own['standard_errors']['identity_top1']:.3f}")
    return f"Identity found again among {GALLERY}, {pictures} pictures, ± a standard error: {', '.join(parts)}"


def _grid(
    trial: Trial, titles: list[str], columns: list[UInt8[np.ndarray, "concepts prompts h w 3"]]
) -> UInt8[np.ndarray, "height width 3"]:
    """A block for each prompt, with a row for each concept: the picture given, and one of each column."""
    blocks = []
    for index, prompt in enumerate(trial.prompts):
        rows = [[picture, *(column[row, index] for column in columns)] for row, picture in enumerate(trial.pictures)]
        blocks.append(picture_grid(rows, titles=["given", *titles], heading=prompt, side=_SCALE * trial.pictures.shape[1]))
    return side_by_side(blocks)
