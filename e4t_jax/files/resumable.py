"""Many concepts and pictures as files: each written as soon as it is there, and only what is missing when asked again.

tuned = tune_to_files(domain, sorted(Path("pictures").glob("*.png")), Path("concepts"), resume=True)
drawn = draw_to_files(domain, sorted(Path("concepts").glob("*.safetensors")), ["a photo of *s"], Path("drawn"), resume=True)

Of several processes that make the same call, each does its share (`training.processes.share_of`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from e4t_jax.concept import Concept, said_of_unfamiliar
from e4t_jax.data.images import encode_png, png_origin
from e4t_jax.domain import Domain, Track
from e4t_jax.errors import UserError
from e4t_jax.files import domain_files
from e4t_jax.files.concept_files import concept_at, concept_bytes, load_concept
from e4t_jax.files.picture_files import check_names
from e4t_jax.files.places import local_path
from e4t_jax.files.reports import picture_texts
from e4t_jax.objective import Trainable
from e4t_jax.sample import SampleSettings
from e4t_jax.storage import digest, file_digest, to_json, written_behind
from e4t_jax.training.processes import share_of
from e4t_jax.tuning.tune import TuneSettings


class TunedFiles(NamedTuple):
    """What `tune_to_files` did: sizes in bytes and errors by name, those of concepts that were there before among them."""

    asked: int  # of this process's pictures
    sizes: dict[str, int]
    captions: dict[str, list[dict[str, Any]]]  # of each concept, with their weights
    unfamiliar: str  # what to say of pictures unlike the domain's, if anything
    failed: dict[str, UserError]
    seconds: float  # compilation included


class DrawnFiles(NamedTuple):
    """What `draw_to_files` did: each concept's pictures, in the order of the prompts, and errors by name."""

    asked: int  # of this process's concepts
    drawn: int  # of them, not there before
    files: dict[str, list[Path]]
    failed: dict[str, UserError]


def check_pictures(pictures: Sequence[Path]) -> None:
    """Errors: `UserError` when there is no picture, or two of them have one name."""
    empty = "there is no picture; give one or more."
    check_names(pictures, "images", empty=empty, named="concepts are named after their files")


def check_drawing(concepts: Sequence[Path], prompts: Sequence[str]) -> None:
    """Errors: `UserError` when there is no concept or no prompt, or two concept files have one name."""
    empty = "there is none; give one or more files that tuning wrote."
    check_names(concepts, "concepts", empty=empty, named="pictures are named after their concepts")
    if not prompts:
        raise UserError("there is none; give one or more, with *s in it.", "prompts")


def tune_to_files(
    domain: Domain,
    pictures: Sequence[Path],
    folder: Path,
    settings: TuneSettings | None = None,
    *,
    caption: str | None = None,
    resume: bool = False,
    track: Track = iter,
) -> TunedFiles:
    """`Domain.tune_many` with a file NAME.safetensors in `folder` for each picture NAME.

    With `resume`, pictures are left out whose concepts are there already, whole, and made from the same picture, settings and
    domain. A picture that fails does not stop the rest.

    Errors: `UserError` for what concerns all pictures, and when a file cannot be written.
    """
    check_pictures(pictures)
    folder = local_path(folder, "out")
    if (folder / "domain.json").exists():
        domain_files.check_names(folder, [_concept_file(folder, path.stem).name for path in pictures])
    share = share_of(pictures)
    sizes: dict[str, int] = {}
    concepts: list[Concept] = []
    failed: dict[str, UserError] = {}
    began = time.perf_counter()

    def is_done(name: str, origin: str) -> bool:
        there = concept_at(_concept_file(folder, name)) if resume else None
        if there is None or there.origin != origin:
            return False
        concepts.append(there._replace(trainable=Trainable()))
        return True

    with written_behind() as write:
        outcomes = domain.tune_many(share, settings, caption=caption, done=is_done) if share else ()
        for outcome in track(outcomes):
            path = _concept_file(folder, outcome.name)
            if outcome.error is not None:
                failed[outcome.name] = outcome.error
            elif outcome.result is None:
                sizes[outcome.name] = path.stat().st_size
            else:
                content = concept_bytes(outcome.result)
                concepts.append(outcome.result._replace(trainable=Trainable()))  # the rest need not be kept
                sizes[outcome.name] = len(content)
                write(path, content)
    captions = {concept.name: list((concept.tuning or {}).get("captions", [])) for concept in concepts}
    unfamiliar = said_of_unfamiliar(concepts, domain.domain_token)
    return TunedFiles(len(share), sizes, captions, unfamiliar, failed=failed, seconds=time.perf_counter() - began)


def draw_to_files(
    domain: Domain,
    concepts: Sequence[Path],
    prompts: Sequence[str],
    folder: Path,
    settings: SampleSettings | None = None,
    *,
    resume: bool = False,
    track: Track = iter,
) -> DrawnFiles:
    """`Domain.generate_many` with a file CONCEPT_PROMPT.png in `folder` for each concept file and prompt, counted from 0.

    With `resume`, concepts are left out whose pictures are there already, whole, and drawn with the same prompts, settings and
    domain. A concept that fails does not stop the rest.

    Errors: `UserError` for what concerns all concepts, and when a file cannot be written.
    """
    check_drawing(concepts, prompts)
    folder = local_path(folder, "out")
    share, settings = share_of(concepts), settings or SampleSettings()
    failed: dict[str, UserError] = {}
    origins: dict[str, str] = {}
    files = {path.stem: [folder / f"{path.stem}_{index}.png" for index in range(len(prompts))] for path in share}
    drawn = 0

    def to_draw() -> Iterator[Concept]:
        for path in share:
            try:
                concept = load_concept(path, domain.fingerprint)
                origins[path.stem] = _origin_of_pictures(domain, path, prompts, settings)
            except UserError as error:
                failed[path.stem] = error
                continue
            if not (resume and all(png_origin(file) == origins[path.stem] for file in files[path.stem])):
                yield concept

    with written_behind() as write:
        outcomes = domain.generate_many(to_draw(), prompts, settings, count=len(share)) if share else ()
        for outcome in track(outcomes):
            if outcome.error is not None:
                failed[outcome.name] = outcome.error
                continue
            drawn += 1
            for file, prompt, picture in zip(files[outcome.name], prompts, outcome.unwrap(), strict=True):
                texts = picture_texts(domain, settings, outcome.name, prompt)
                write(file, encode_png(picture, origins[outcome.name], texts=texts))
    return DrawnFiles(len(share), drawn, {name: own for name, own in files.items() if name not in failed}, failed)


def _concept_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _origin_of_pictures(domain: Domain, concept: Path, prompts: Sequence[str], settings: SampleSettings) -> str:
    """A checksum of all that a concept's pictures follow from."""
    inputs = {**dataclasses.asdict(settings), "prompts": list(prompts), "domain": domain.fingerprint, "dtype": domain.base.dtype}
    return digest(to_json({**inputs, "concept": file_digest(concept)}).encode())
