"""Personalises a domain from pictures: one concept a picture, any number of them, several tuned in one compiled call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from e4t_jax.cli.shared import Inline, NetworkCommand, all_done, names_of, progress, say, use_all_cores
from e4t_jax.data.images import is_mask, mask_beside
from e4t_jax.errors import UserError
from e4t_jax.files.concept_files import concept_bytes, load_concept
from e4t_jax.files.domain_files import check_names, load_domain
from e4t_jax.storage import check_writable, to_json, write_file, written_behind
from e4t_jax.training.processes import Processes, is_first, joined, own_file, share_of
from e4t_jax.tuning.tune import TuneSettings


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Tune one concept for each picture; writes a .safetensors file a concept, as soon as it is tuned, and tune.json."""

    images: tuple[Path, ...]
    """Pictures, one a concept."""
    out: Path
    """Folder for the concept files."""
    domain: str = "creatures"
    """Domain: "creatures", or a folder that train.pretrain wrote."""
    caption: str | None = None
    """What all the pictures show around *s ("a photo of *s in a meadow"); where not given, it is read off each picture."""
    resume: bool = False
    """Leave pictures out whose concepts are in --out already, whole, and made from the same picture, settings and domain."""
    tuning: Annotated[TuneSettings, Inline] = TuneSettings()
    processes: Annotated[Processes, Inline] = Processes()


def main(config: Config) -> None:
    with joined(config.processes):
        use_all_cores()
        _tune(config)


def _tune(config: Config) -> None:
    images = pictures_of(config.images)
    names = names_of(images, "images", empty="there is no picture; give one or more.", named="concepts are named after their files")
    check_writable(config.out)
    if (config.out / "domain.json").exists():
        check_names(config.out, [f"{name}.safetensors" for name in names])
    domain = load_domain(config.domain, **config.policy())
    # Every process of a run tunes its share, and writes its own files.
    share = share_of(images)
    sizes: dict[str, int] = {}
    failed: dict[str, UserError] = {}
    began = time.perf_counter()

    def done(name: str, origin: str) -> bool:
        return config.resume and _origin_of(config.out / f"{name}.safetensors") == origin

    with written_behind() as write:
        outcomes = domain.tune_many(share, config.tuning, caption=config.caption, done=done) if share else ()
        for outcome in progress(outcomes, "tuning", unit="concept", disable=not is_first()):
            path = config.out / f"{outcome.name}.safetensors"
            if outcome.error is not None:
                failed[outcome.name] = outcome.error
            elif outcome.result is None:
                sizes[outcome.name] = path.stat().st_size
            else:
                content = concept_bytes(outcome.result)
                sizes[outcome.name] = len(content)
                write(path, content)
    seconds = time.perf_counter() - began
    facts = {
        "domain": config.domain,
        **dataclasses.asdict(config.tuning),
        "caption": config.caption,
        "seconds": round(seconds, 3),  # compilation included
        "bytes_per_concept": sizes,
        "failed": {name: str(error) for name, error in failed.items()},
    }
    if sizes:
        write_file(own_file(config.out / "tune.json"), to_json(facts))
        print(f"{len(sizes)} concepts are in {config.out} ({seconds:.1f} s, compilation included)")
    all_done(failed, len(share), "pictures")


def _origin_of(path: Path) -> str | None:
    """What a concept's file was made of, if it is there and whole."""
    if not path.exists():
        return None
    try:
        return load_concept(path).origin
    except UserError:
        return None


def pictures_of(paths: Sequence[Path]) -> list[Path]:
    """The pictures among some files: a mask that a shell's `*.png` caught with its picture is left out, and said."""
    masks = {mask_beside(path) for path in paths if not is_mask(path)}
    for path in paths:
        if path in masks:
            say(f"{path} is the mask of a picture, and no concept of its own.")
    return [path for path in paths if path not in masks]
