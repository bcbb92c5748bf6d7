"""The judges' training: pictures drawn, batches of them, one judge after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from e4t_jax.checks import Count, CountOrNone, Seed
from e4t_jax.creatures.judging import judge_losses as losses
from e4t_jax.creatures.judging.judges import JUDGES, WHO_IS_IT, flatten_judge
from e4t_jax.creatures.world.attributes import Record, sample_identities, sample_scenes
from e4t_jax.creatures.world.pictures import as_floats, records
from e4t_jax.creatures.world.renderer import IMAGE_SIZE, render
from e4t_jax.errors import UserError
from e4t_jax.storage import write_file
from e4t_jax.training import optimizers
from e4t_jax.training.loop import Loss, Run, init_state, step_of, train

_VIEWS = 6
_TOGETHER = 43  # identities in a batch, three views each
_RATE = 2e-3
# Judge -> what it learns from, and how many of them in a batch.
_SOURCES = {
    "identity": ("identities", _TOGETHER),
    "fish": ("identities", _TOGETHER),
    "scene": ("scenes", 128),
    "attributes": ("creatures", 256),
}


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """How the judges are trained."""

    identities: Count = 4096
    """Identities of either class to learn from, six pictures each."""
    identity_steps: CountOrNone = 2000
    """Steps of each identity judge, at 129 pictures a step."""
    scenes: Count = 32768
    """Pictures for the scene judge to learn from, an identity each."""
    scene_steps: CountOrNone = 4000
    """Steps of the scene judge, at 128 pictures a step."""
    creatures: Count = 524288
    """Pictures for the attribute judge to learn from, an identity each."""
    attribute_steps: CountOrNone = 36000
    """Steps of the attribute judge, at 256 pictures a step."""
    seed: Seed = 77
    """Seed of the weights, the pictures and the order of training."""


def train_judge(name: str, settings: JudgeSettings, out: Path, track: Callable[..., Any]) -> None:
    """Trains one judge (a key of `JUDGES`) and writes it to `out`.

    Errors: `UserError` for fewer pictures than a batch holds, or a loss that is not finite.
    """
    source, together = _SOURCES[name]
    if getattr(settings, source) < together:
        raise UserError(f"{getattr(settings, source)} is less than a batch of {together}; give more.", source)
    generator = np.random.default_rng(settings.seed)
    loss: Loss
    batches: Iterator[Any]
    if name in WHO_IS_IT.values():
        kind = next(kind for kind, own in WHO_IS_IT.items() if own == name)
        loss, steps = partial(losses.identity_loss, name), settings.identity_steps
        batches = _identity_batches(settings.seed, settings.identities, kind, generator)
    elif name == "scene":
        identities, scenes = records(settings.seed + 1, settings.scenes)
        loss, steps = partial(losses.label_loss, name), settings.scene_steps
        batches = _labelled_batches(identities, scenes, losses.scene_labels(scenes), together, generator)
    else:
        identities = sample_identities(settings.seed + 2, settings.creatures)
        scenes = sample_scenes(settings.seed + 2, settings.creatures)
        loss, steps = partial(losses.label_loss, name), settings.attribute_steps
        batches = _labelled_batches(identities, scenes, losses.attribute_labels(identities), together, generator)
    write_file(
        out / f"{name}.safetensors", save(flatten_judge(_fit(name, loss, batches, steps=steps, seed=settings.seed, track=track)))
    )


def _fit(name: str, loss: Loss, batches: Iterator[Any], *, steps: int, seed: int, track: Callable[..., Any]) -> dict:
    tx, key = optimizers.judge(_RATE, steps), jax.random.key(seed)
    state = init_state(JUDGES[name].init(key, jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3)))["params"], tx)
    run = Run(f"{name} judge", steps, track=lambda steps: track(steps, f"{name} judge"), watch=50)
    step = jax.jit(step_of(loss, tx), donate_argnums=0)
    return jax.device_get(train(run, step, state, None, lambda first: batches, key=key).params)


def _identity_batches(seed: int, count: int, kind: str, generator: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Three views of each of some identities, and who they are."""
    views = losses.identity_views(seed, count, _VIEWS, kind=kind)[0]
    views = views.reshape(count, _VIEWS, *views.shape[1:])
    while True:
        who = generator.choice(count, _TOGETHER, replace=False)
        which = np.argsort(generator.uniform(size=(_TOGETHER, _VIEWS)), axis=1)[:, :3]
        yield as_floats(views[who[:, None], which].reshape(-1, *views.shape[2:])), np.repeat(who, 3)


def _labelled_batches(
    identities: Record, scenes: Record, labels: dict[str, np.ndarray], size: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Pictures and their labels."""
    pictures = render(identities, scenes)[0]
    while True:
        rows = generator.choice(len(pictures), size, replace=False)
        yield as_floats(pictures[rows]), {head: label[rows] for head, label in labels.items()}
