"""What was done, beside its results: tune.json and generate.json, the texts in a PNG file, and the grid of what was drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from e4t_jax.data.grids import picture_grid
from e4t_jax.data.images import read_image, to_uint8
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.files.concept_files import concept_at
from e4t_jax.sample import SampleSettings
from e4t_jax.samplers import own_method
from e4t_jax.storage import read_json
from e4t_jax.tuning.personalise import picture_input
from e4t_jax.tuning.tune import TuneSettings

TUNED = "tune.json"
_LEAST, _MOST = 160, 256  # pixels a side of a picture in the grid: smaller ones are magnified, larger ones made smaller


def tuning_report(
    domain: Domain,
    settings: TuneSettings,
    captions: Mapping[str, Sequence[Mapping[str, Any]]],
    pictures: Sequence[Path],
    *,
    caption: str | None = None,
) -> dict[str, Any]:
    """What tuning did, as plain data: every setting as it was used, each concept's picture, captions and their weights.

    Args:
        domain: The domain.
        settings: As they were given.
        captions: Those of each concept by name, with their weights, the heaviest first (`templates.heaviest_captions`).
        pictures: The pictures' files.
        caption: The one that was given for all pictures; where there was none, `caption` is the heaviest of each.

    Errors: `UserError` for settings out of range.
    """
    likeliest = {name: own[0]["caption"] if own else "" for name, own in captions.items()}
    return {
        **settings.used(settings.recipe_of(domain.regularisation)),
        "caption": likeliest if caption is None else caption,
        "captions": {name: list(own) for name, own in captions.items()},
        "pictures": {path.stem: str(path.absolute()) for path in pictures},
    }


def drawing_settings(domain: Domain, settings: SampleSettings) -> dict[str, Any]:
    """The settings of a drawing as plain data, with the domain's guidance and the base's sampler where none was given.

    Args:
        domain: The domain.
        settings: As they were given.

    Errors: none.
    """
    guidance = domain.guidance if settings.guidance is None else settings.guidance
    sampling = own_method(domain.base.scheduler) if settings.sampling is None else settings.sampling
    return {**dataclasses.asdict(settings), "guidance": guidance, "sampling": sampling}


def drawing_report(
    domain: Domain,
    settings: SampleSettings,
    prompts: Sequence[str],
    files: Mapping[str, Sequence[Path]],
    concepts: Sequence[Path],
) -> dict[str, Any]:
    """What drawing did, as plain data: every setting as it was used, and which file shows which concept in which prompt.

    Args:
        domain: The domain.
        settings: As they were given.
        prompts: The prompts.
        files: Of each concept by name, its pictures in the order of the prompts.
        concepts: The concepts' files.

    Errors: none.
    """
    named = {path.stem: str(path.absolute()) for path in concepts}
    shown = {
        file.name: {"concept": name, "prompt": prompt}
        for name, own in files.items()
        for file, prompt in zip(own, prompts, strict=True)
    }
    return {
        **drawing_settings(domain, settings),
        "prompts": list(prompts),
        "concepts": {name: named[name] for name in files},
        "pictures": shown,
    }


def picture_texts(domain: Domain, settings: SampleSettings, concept: str, prompt: str) -> dict[str, str]:
    """What a drawn picture's own file says of it, by the names that the PNG format has for such texts and by plain ones.

    Args:
        domain: The domain.
        settings: How it was drawn.
        concept: The concept's name.
        prompt: The prompt.

    Errors: none.
    """
    used = drawing_settings(domain, settings)
    said = {"prompt": prompt, "concept": concept, **{name: str(value) for name, value in used.items()}}
    return {"Title": prompt, "Software": "e4t-jax", **said}


def drawing_grid(
    domain: Domain, prompts: Sequence[str], files: Mapping[str, Sequence[Path]], concepts: Sequence[Path]
) -> UInt8[np.ndarray, "height width 3"]:
    """Drawn pictures with a row for each concept and a column for each prompt; where it is known, the picture given comes first.

    Args:
        domain: The domain.
        prompts: The prompts.
        files: Of each concept by name, its pictures in the order of the prompts.
        concepts: The concepts' files.

    Errors: none.
    """
    named = {path.stem: path for path in concepts}
    drawn = {name: [np.asarray(Image.open(path)) for path in own] for name, own in files.items()}
    given = {name: given_picture(named[name], domain.base.image_size) for name in files}
    known = any(picture is not None for picture in given.values())
    size = domain.base.image_size
    return picture_grid(
        [[*([given[name]] if known else []), *own] for name, own in drawn.items()],
        titles=[*(["given"] if known else []), *prompts],
        labels=list(drawn),
        side=min(_MOST, size * max(1, -(-_LEAST // size))),
    )


def given_picture(concept: Path, size: int) -> UInt8[np.ndarray, "h w 3"] | None:
    """The picture that a concept was tuned on, as the networks saw it; None where its tune.json does not lead to that very picture.

    Args:
        concept: The concept's file.
        size: Pixels a side.

    Errors: none.
    """
    tuning = getattr(concept_at(concept), "tuning", None) or {}
    for report in sorted(concept.parent.glob(f"{Path(TUNED).stem}*.json")):
        try:
            paths = read_json(report, "").get("pictures")
            path = paths.get(concept.stem) if isinstance(paths, dict) else None
            picture, mask = read_image(path, size, use_mask=tuning.get("mask") != "none") if isinstance(path, str) else (None, None)
        except UserError:
            continue
        if picture is not None and f"{picture_input(picture, mask).checksum:08x}" == tuning.get("picture"):
            return to_uint8(picture)
    return None
