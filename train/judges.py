"""Trains the two judges of the embedded world (identity by metric learning, scene by classification) and validates them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save

from e4t_jax.evaluation import judge_training as training
from e4t_jax.evaluation.judges import JUDGES_FOLDER, IdentityJudge, SceneJudge, flatten_judge, load_judges
from e4t_jax.world.pictures import as_floats, records
from e4t_jax.world.renderer import render
from e4t_jax.writing import write_file
from train.command import progress, run

_VIEWS = 6


@dataclass(frozen=True)
class Config:
    """Train the judges that evaluate pictures of the embedded world."""

    out: Path = JUDGES_FOLDER
    """Folder for identity.safetensors and scene.safetensors."""
    identities: int = 4096
    """Identities to learn from, six pictures each."""
    identity_steps: int = 2000
    """Steps of the identity judge, at 129 pictures a step."""
    scenes: int = 32768
    """Pictures for the scene judge to learn from, an identity each."""
    scene_steps: int = 4000
    """Steps of the scene judge, at 128 pictures a step."""
    seed: int = 77
    """Seed of the weights, the pictures and the order of training."""


def fit(name, loss, params, batches, steps, key):
    """AdamW with a cosine rate; returns the final parameters."""
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, min(100, steps // 5), steps, 1e-5), weight_decay=0.02)
    step, moments = training.make_judge_step(loss, tx), tx.init(params)
    bar = progress(range(steps), f"{name} judge", total=steps)
    for index, (images, targets) in zip(bar, batches, strict=False):
        params, moments, value = step(params, moments, images, targets, jax.random.fold_in(key, index))
        if index % 50 == 0:
            bar.set_postfix(loss=f"{float(value):.3f}")
    return params


def main(config: Config) -> None:
    key = jax.random.key(config.seed)
    generator = np.random.default_rng(config.seed)

    print("drawing", flush=True)
    views, _, _ = training.identity_views(config.seed, config.identities, _VIEWS)
    views = views.reshape(config.identities, _VIEWS, *views.shape[1:])
    blank = jnp.zeros((1, *views.shape[2:]))

    def identity_batches():
        while True:
            who = generator.choice(config.identities, 43, replace=False)
            which = np.argsort(generator.uniform(size=(43, _VIEWS)), axis=1)[:, :3]
            yield as_floats(views[who[:, None], which].reshape(-1, *views.shape[2:])), np.repeat(who, 3)

    params = IdentityJudge().init(key, blank)["params"]
    identity = fit("identity", training.identity_loss, params, identity_batches(), config.identity_steps, key)
    write_file(config.out / "identity.safetensors", save(flatten_judge(identity)))

    identities, scenes = records(config.seed + 1, config.scenes)
    pictures, labels = render(identities, scenes)[0], training.scene_labels(identities, scenes)

    def scene_batches():
        while True:
            rows = generator.choice(len(pictures), 128, replace=False)
            yield as_floats(pictures[rows]), {head: label[rows] for head, label in labels.items()}

    params = SceneJudge().init(key, blank)["params"]
    scene = fit("scene", training.scene_loss, params, scene_batches(), config.scene_steps, key)
    write_file(config.out / "scene.safetensors", save(flatten_judge(scene)))
    print(json.dumps(training.validate_judges(load_judges(config.out), seed=0, split="validation"), indent=2))


if __name__ == "__main__":
    run(main)
