"""Personalises a domain from pictures: one concept a picture, any number of them, several tuned in one compiled call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import progress, raise_failures, say
from e4t_jax.cli.run import Inline, NetworkCommand
from e4t_jax.files.domain_files import load_domain
from e4t_jax.files.picture_files import without_masks
from e4t_jax.files.reports import TUNED, tuning_report
from e4t_jax.files.resumable import check_pictures, tune_to_files
from e4t_jax.storage import check_writable, to_json, write_file
from e4t_jax.training.processes import Processes, is_first, joined, own_file
from e4t_jax.tuning.tune import TuneSettings


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Tune one concept for each picture; writes a .safetensors file a concept, as soon as it is tuned, and tune.json."""

    example = "e4t tune --images examples/venus.png examples/ada.png --out outputs/tuned"

    images: tuple[Path, ...]
    """Pictures, one a concept."""
    out: Path
    """Folder for the concept files."""
    domain: str = "creatures"
    """Domain: "creatures" (draws creatures only), "faces" (fetched when first asked for), or a folder that `e4t pretrain` wrote."""
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
    pictures, masks = without_masks(config.images)
    for mask in masks:
        say(f"{mask} is the mask of a picture, and no concept of its own.")
    check_pictures(pictures)
    check_writable(config.out)
    domain = load_domain(config.domain, **config.policy())
    bar = partial(progress, description="tuning", unit="concept", disable=not is_first())
    tuned = tune_to_files(domain, pictures, config.out, config.tuning, caption=config.caption, resume=config.resume, track=bar)
    report = {
        "domain": config.domain,
        **tuning_report(domain, config.tuning, tuned.captions, pictures, caption=config.caption),
        "seconds": round(tuned.seconds, 3),
        "bytes_per_concept": tuned.sizes,
        "failed": {name: str(error) for name, error in tuned.failed.items()},
    }
    if tuned.sizes:
        write_file(own_file(config.out / TUNED), to_json(report))
        print(f"{len(tuned.sizes)} concepts are in {config.out} ({tuned.seconds:.1f} s, compilation included)")
    if tuned.unfamiliar:
        say(f"Warning: {tuned.unfamiliar}")
    raise_failures(tuned.failed, tuned.asked, "pictures")
