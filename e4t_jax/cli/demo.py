"""The whole method in one go, a grid to look at: on held-out creatures of the drawn world, or on pictures of your own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from e4t_jax.checks import Concepts, SamplingSteps, Seed, TuningSteps
from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import progress
from e4t_jax.cli.run import NetworkCommand
from e4t_jax.creatures.judging.demonstration import demonstrate, identity_line
from e4t_jax.creatures.judging.judges import load_judges
from e4t_jax.data.images import encode_png, read_image
from e4t_jax.errors import UserError
from e4t_jax.evaluation.own_pictures import DrawnSteps, draw_steps, step_grid
from e4t_jax.files.concept_files import concept_bytes
from e4t_jax.files.domain_files import load_domain
from e4t_jax.files.picture_files import without_masks
from e4t_jax.files.resumable import check_pictures
from e4t_jax.sample import SampleSettings
from e4t_jax.storage import check_writable, to_json, write_files
from e4t_jax.templates import SHOWCASE

_DRAWN = "creatures"  # the domain whose held-out examples can be drawn
_FEWEST_PIXELS = 64  # of a picture that is only looked at here


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Tune six creatures that the domain has never seen from one picture each, and draw them in four new scenes; or your own
    pictures: e4t demo --domain faces --images me.jpg."""

    example = "e4t demo"

    out: Path = Path("outputs/demo")
    """Folder for the grids, the pictures and the concept files; with the drawn creatures, metrics.json too."""
    domain: str = "creatures"
    """Domain: "creatures" (draws creatures only), "faces" (fetched when first asked for), or a folder that `e4t pretrain` wrote."""
    images: tuple[Path, ...] = ()
    """Pictures of your own, a grid for each: the picture, the encoder alone, --steps, and three times as many."""
    concepts: Concepts = 6
    """Number of held-out identities, without --images."""
    steps: TuningSteps = 5
    """Tuning steps."""
    sampling_steps: SamplingSteps = 25
    """Steps of the sampler."""
    seed: Seed = 7
    """Seed of the identities, their pictures, the prompts and the noise."""


def main(config: Config) -> None:
    use_all_cores()
    check_writable(config.out)
    if config.images:
        _show_own(config)
    elif config.domain == _DRAWN:
        _show_creatures(config)
    else:
        raise UserError(f"there is none, and only {_DRAWN} has examples of its own; give pictures to tune.", "images")


def _show_own(config: Config) -> None:
    images, _ = without_masks(config.images)
    check_pictures(images)
    for image in images:
        read_image(image, _FEWEST_PIXELS)  # what is wrong with one is said before anything is fetched
    domain, drawing = load_domain(config.domain, **config.policy()), SampleSettings(config.seed, config.sampling_steps)
    domain.sampler(drawing)
    prompts = SHOWCASE[domain.template]
    steps = sorted({0, config.steps, 3 * config.steps})
    shown = draw_steps(
        domain, images, prompts, drawing, steps=steps, bars=lambda name: partial(progress, description=name, unit="concept")
    )
    for image, drawn in zip(images, shown, strict=True):
        grid = step_grid(drawn, prompts, f"{image.stem}, in the domain {config.domain}")
        write_files(_files_of(config.out, image.stem, drawn) | {config.out / f"{image.stem}_grid.png": encode_png(grid)})
        print(f"Grid: {config.out / f'{image.stem}_grid.png'}")
    print(f"Concepts and single pictures: {config.out}")


def _files_of(out: Path, name: str, drawn: DrawnSteps) -> dict[Path, bytes]:
    """Concepts and pictures of one picture given, by steps of tuning."""
    files = {out / f"{name}_{steps}.safetensors": concept_bytes(concept) for steps, concept in drawn.concepts.items()}
    for steps, pictures in drawn.pictures.items():
        files |= {out / f"{name}_{steps}_{index}.png": encode_png(picture) for index, picture in enumerate(pictures)}
    return files


def _show_creatures(config: Config) -> None:
    shown = demonstrate(
        load_domain(_DRAWN, **config.policy()),
        load_judges(),
        config.out,
        concepts=config.concepts,
        steps=config.steps,
        sampling_steps=config.sampling_steps,
        seed=config.seed,
        bars=lambda name: partial(progress, description=name),
    )
    write_files({config.out / "grid.png": encode_png(shown.grid), config.out / "metrics.json": to_json(shown.metrics)})
    print("\n".join(f"{index}. {prompt}" for index, prompt in enumerate(shown.prompts, 1)))
    print(identity_line(shown.metrics, config.steps, config.concepts * len(shown.prompts)))
    print(f"Pictures: {config.out / 'grid.png'}\nMetrics:  {config.out / 'metrics.json'}\nConcepts: {config.out / 'concepts'}")
