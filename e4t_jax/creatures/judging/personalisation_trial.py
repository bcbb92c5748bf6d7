"""A trial of personalisation in the drawn world: held-out identities, one picture each, other scenes to draw them in.

It goes the user's way: picture files without mask or caption, `Domain.tune` with its defaults, concept files read back,
`Domain.generate`. For diagnosis, tuning may get the true mask or caption as well.
"""

from __future__ import annotations

import dataclasses
import time
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from e4t_jax.concept import Concept
from e4t_jax.creatures.judging.judge_losses import attribute_labels, identity_prototypes, share_right
from e4t_jax.creatures.judging.judges import WHO_IS_IT, judge
from e4t_jax.creatures.world.attributes import CONTEXTS, STYLES, Record, of_class, sample_identities, sample_scenes, take
from e4t_jax.creatures.world.captions import sentence
from e4t_jax.creatures.world.pictures import as_floats
from e4t_jax.creatures.world.renderer import render
from e4t_jax.data.images import encode_png
from e4t_jax.domain import Domain, Track
from e4t_jax.errors import UserError
from e4t_jax.evaluation.metrics import Drawn, edge_energy, measure, standard_error
from e4t_jax.files.concept_files import load_concept, save_concept
from e4t_jax.storage import write_file
from e4t_jax.tuning.tune import TuneSettings
from e4t_jax.words import PLACEHOLDER

GALLERY = 64  # identities among which a generated picture must find its own
Inputs = Literal["picture", "mask", "caption", "both"]  # what tuning gets: the picture alone, with its mask, its caption, or both


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """What is asked: the pictures given, and the contexts and styles to draw in."""

    seed: int
    split: str
    kind: str  # the class of what is shown
    identities: Record
    pictures: UInt8[np.ndarray, "concepts h w 3"]
    masks: UInt8[np.ndarray, "concepts h w"]
    captions: list[str]  # of the pictures given
    contexts: np.ndarray
    styles: np.ndarray

    @property
    def names(self) -> list[str]:
        """A name for each concept."""
        return [f"{self.split}_{self.seed}_{row:03d}" for row in range(len(self.pictures))]

    @property
    def prompts(self) -> list[str]:
        """The prompts to draw."""
        pairs = zip(self.styles, self.contexts, strict=True)
        return [sentence(int(style), PLACEHOLDER, int(context), [], named=True) for style, context in pairs]

    @cached_property
    def truth(self) -> UInt8[np.ndarray, "concepts prompts h w 3"]:
        """What a perfect artist would draw for every prompt (in a pose of its own)."""
        count, prompts = len(self.pictures), len(self.contexts)
        rows = np.repeat(np.arange(count), prompts)
        contexts, styles = np.tile(self.contexts, count), np.tile(self.styles, count)
        scenes = sample_scenes(
            self.seed + 2_000_003, len(rows), split=self.split, context=contexts, style=styles, **of_class(self.kind)
        )
        pictures = render(take(self.identities, rows), scenes)[0]
        return pictures.reshape(count, prompts, *pictures.shape[1:])


def held_out(
    seed: int, count: int, prompts: int = 4, *, split: str = "test", any_style: bool = False, kind: str = "creature"
) -> Trial:
    """`count` identities of a seed, a picture of each (a photo, or in any style), prompts in contexts that none of them shows.

    Errors: `UserError` for a class that no judge tells apart.
    """
    if kind not in WHO_IS_IT:
        raise UserError(f"No judge tells one {kind} from another; only of {', '.join(WHO_IS_IT)} can a likeness be measured.")
    generator = np.random.default_rng([seed, 9])
    order = generator.permutation(len(CONTEXTS))
    asked = np.resize(order[: min(prompts, len(CONTEXTS) - 2)], prompts)
    shown = generator.choice(np.setdiff1d(order, asked), count)
    styles = np.resize(generator.permutation(len(STYLES)), prompts)
    shown_styles = generator.integers(0, len(STYLES), count) if any_style else np.zeros(count, int)
    identities = take(sample_identities(seed, max(count, GALLERY), split=split), slice(0, count))
    scenes = sample_scenes(seed, count, split=split, context=shown, style=shown_styles, **of_class(kind))
    pictures, masks = render(identities, scenes)
    pairs = zip(shown_styles, shown, strict=True)
    captions = [sentence(int(style), PLACEHOLDER, int(context), [], named=True) for style, context in pairs]
    return Trial(
        seed=seed,
        split=split,
        kind=kind,
        identities=identities,
        pictures=pictures,
        masks=masks,
        captions=captions,
        contexts=asked,
        styles=styles,
    )


def write_pictures(trial: Trial, folder: Path, inputs: Inputs) -> list[Path]:
    """The pictures as PNG files, with NAME.mask.png beside them where masks are among the `inputs`."""
    paths = [folder / f"{name}.png" for name in trial.names]
    for path, picture, mask in zip(paths, trial.pictures, trial.masks, strict=True):
        write_file(path, encode_png(picture))
        sidecar = path.with_name(f"{path.stem}.mask.png")
        sidecar.unlink(missing_ok=True)  # of an earlier trial with masks
        if inputs in ("mask", "both"):
            write_file(sidecar, encode_png(mask))
    return paths


def tune_trial(
    domain: Domain,
    trial: Trial,
    folder: Path,
    settings: TuneSettings | None = None,
    *,
    inputs: Inputs = "picture",
    warm: bool = False,
    track: Track = iter,
) -> tuple[list[Concept], dict[str, float]]:
    """Concepts as a user gets them, by way of files in `folder`; what they took in seconds and bytes.

    With `warm`, a first call is tuned before the clock starts, so that compilation does not count.
    """
    paths = write_pictures(trial, folder / "given", inputs)
    captions = trial.captions if inputs in ("caption", "both") else None
    if warm:
        next(domain.tune_many(paths, settings, caption=captions))
    began = time.perf_counter()
    tuned = domain.tune(paths, settings, caption=captions, track=track)
    seconds = (time.perf_counter() - began) / len(paths)
    files = [folder / "concepts" / f"{concept.name}.safetensors" for concept in tuned]
    sizes = [save_concept(path, concept) for path, concept in zip(files, tuned, strict=True)]
    concepts = [load_concept(path, domain.fingerprint) for path in files]
    return concepts, {"seconds_per_concept": seconds, "bytes_per_concept": int(np.median(sizes))}


class Recognised(NamedTuple):
    """What the judge of identities makes of every picture drawn for a trial."""

    right: Bool[np.ndarray, "concepts prompts"]  # its own identity is the nearest of the gallery's
    similarity: Float[np.ndarray, "concepts prompts"]  # cosine with its own identity


def recognise(judges: dict, trial: Trial, images: UInt8[np.ndarray, "concepts prompts h w 3"]) -> Recognised:
    """Each picture beside the identities of the gallery."""
    count, prompts = images.shape[:2]
    kind = WHO_IS_IT[trial.kind]
    prototypes = identity_prototypes(judges, trial.seed, max(count, GALLERY), split=trial.split, kind=trial.kind)
    likeness = judge(kind, judges[kind], as_floats(images.reshape(-1, *images.shape[2:]))) @ prototypes.T
    likeness = np.asarray(likeness).reshape(count, prompts, -1)
    own = np.arange(count)[:, None]
    return Recognised(np.argmax(likeness, -1) == own, np.take_along_axis(likeness, own[..., None], -1)[..., 0])


def judge_pictures(
    domain: Domain, judges: dict, trial: Trial, images: UInt8[np.ndarray, "concepts prompts h w 3"]
) -> dict[str, Any]:
    """The measures of the pictures drawn for a trial, by the judges and by the base's own CLIP."""
    count, prompts = images.shape[:2]
    flat = as_floats(images.reshape(-1, *images.shape[2:]))
    who = np.repeat(np.arange(count), prompts)
    found = recognise(judges, trial, images)
    scene = judge("scene", judges["scene"], flat)
    return {
        "identity_top1": float(np.mean(found.right)),
        "identity_similarity": float(np.mean(found.similarity)),
        "standard_errors": {
            "identity_top1": standard_error(found.right),
            "identity_similarity": standard_error(found.similarity),
        },
        "context_top1": share_right(scene["context"], np.tile(trial.contexts, count)),
        "style_top1": share_right(scene["style"], np.tile(trial.styles, count)),
        **measure(Drawn(domain, images, trial.pictures, trial.prompts)),
        **(surviving_attributes(judges["attributes"], take(trial.identities, who), flat) if trial.kind == "creature" else {}),
        "sharpness": sharpness(trial, images),
    }


def surviving_attributes(params: dict, identities: Record, pictures: Float[np.ndarray, "pictures h w 3"]) -> dict[str, Any]:
    """For every attribute the share of pictures in which the judge reads that of their creature, and the mean over all."""
    seen = judge("attributes", params, pictures)
    # Of few creatures, none may have a trim to see.
    labels = {name: label for name, label in attribute_labels(identities).items() if (label >= 0).any()}
    survive = {name: share_right(seen[name], label) for name, label in labels.items()}
    return {"attributes_mean": float(np.mean(list(survive.values()))), "attributes": survive}


def sharpness(trial: Trial, images: UInt8[np.ndarray, "concepts prompts h w 3"]) -> dict[str, float]:
    """Edge energy (mean squared difference of neighbouring pixels) of generated over true pictures, by style."""
    columns = {style: trial.styles == index for index, style in enumerate(STYLES) if index in trial.styles}
    return {style: edge_energy(images[:, own]) / edge_energy(trial.truth[:, own]) for style, own in columns.items()}
