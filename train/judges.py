"""Trains the judges of the embedded world (identity by metric learning, scene and attributes by classification), validates them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save

from e4t_jax.evaluation import judge_training as training
from e4t_jax.evaluation.judges import JUDGES, JUDGES_FOLDER, flatten_judge, load_judges
from e4t_jax.world.attributes import Record, sample_identities, sample_scenes
from e4t_jax.world.pictures import as_floats, records
from e4t_jax.world.renderer import IMAGE_SIZE, render
from e4t_jax.writing import write_file
from train.command import Command, progress, run

_VIEWS = 6


@dataclass(frozen=True)
class Config(Command):
    """Train the judges that evaluate pictures of the embedded world."""

    out: Path = JUDGES_FOLDER
    """Folder for identity.safetensors, scene.safetensors and attributes.safetensors."""
    only: Literal["identity", "scene", "attributes"] | None = None
    """Train this judge alone; the others must be there already."""
    identities: int = 4096
    """Identities to learn from, six pictures each."""
    identity_steps: int = 2000
    """Steps of the identity judge, at 129 pictures a step."""
    scenes: int = 32768
    """Pictures for the scene judge to learn from, an identity each."""
    scene_steps: int = 4000
    """Steps of the scene judge, at 128 pictures a step."""
    creatures: int = 65536
    """Pictures for the attribute judge to learn from, an identity each."""
    attribute_steps: int = 8000
    """Steps of the attribute judge, at 128 pictures a step."""
    seed: int = 77
    """Seed of the weights, the pictures and the order of training."""


def fit(name, loss, batches, steps, out: Path, key):
    """AdamW with a cosine rate; writes the final parameters."""
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, min(100, steps // 5), steps, 1e-5), weight_decay=0.02)
    params = JUDGES[name].init(key, jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3)))["params"]
    step, moments = training.make_judge_step(loss, tx), tx.init(params)
    bar = progress(range(steps), f"{name} judge", total=steps)
    for index, (images, targets) in zip(bar, batches, strict=False):
        params, moments, value = step(params, moments, images, targets, jax.random.fold_in(key, index))
        if index % 50 == 0:
            bar.set_postfix(loss=f"{float(value):.3f}")
    write_file(out / f"{name}.safetensors", save(flatten_judge(params)))


def identity_batches(seed: int, count: int, generator: np.random.Generator):
    """Three views of each of 43 identities, and who they are."""
    views = training.identity_views(seed, count, _VIEWS)[0]
    views = views.reshape(count, _VIEWS, *views.shape[1:])
    while True:
        who = generator.choice(count, 43, replace=False)
        which = np.argsort(generator.uniform(size=(43, _VIEWS)), axis=1)[:, :3]
        yield as_floats(views[who[:, None], which].reshape(-1, *views.shape[2:])), np.repeat(who, 3)


def labelled_batches(identities: Record, scenes: Record, labels: dict[str, np.ndarray], generator: np.random.Generator):
    """128 pictures and their labels."""
    pictures = render(identities, scenes)[0]
    while True:
        rows = generator.choice(len(pictures), 128, replace=False)
        yield as_floats(pictures[rows]), {head: label[rows] for head, label in labels.items()}


def main(config: Config) -> None:
    key, generator = jax.random.key(config.seed), np.random.default_rng(config.seed)
    if config.only in (None, "identity"):
        batches = identity_batches(config.seed, config.identities, generator)
        fit("identity", training.identity_loss, batches, config.identity_steps, config.out, key)
    if config.only in (None, "scene"):
        identities, scenes = records(config.seed + 1, config.scenes)
        batches = labelled_batches(identities, scenes, training.scene_labels(scenes), generator)
        fit("scene", partial(training.label_loss, "scene"), batches, config.scene_steps, config.out, key)
    if config.only in (None, "attributes"):
        identities = sample_identities(config.seed + 2, config.creatures)
        scenes = sample_scenes(config.seed + 2, config.creatures)
        batches = labelled_batches(identities, scenes, training.attribute_labels(identities), generator)
        fit("attributes", partial(training.label_loss, "attributes"), batches, config.attribute_steps, config.out, key)
    print(json.dumps(training.validate_judges(load_judges(config.out), seed=0, split="validation"), indent=2))


if __name__ == "__main__":
    run(main)
