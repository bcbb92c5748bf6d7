"""Trains the judges of the embedded world (identity by metric learning, scene and attributes by classification), validates them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from e4t_jax.cli.progress import progress
from e4t_jax.cli.run import Command, Inline
from e4t_jax.creatures.judging.judge_losses import validate_judges
from e4t_jax.creatures.judging.judge_stages import JudgeSettings, train_judge
from e4t_jax.creatures.judging.judges import JUDGES, WHO_IS_IT, load_judges
from e4t_jax.storage import check_writable


@dataclass(frozen=True)
class Config(Command):
    """Train the judges that evaluate pictures of the embedded world."""

    example = "e4t train-judges --out outputs/new_judges"

    out: Path
    """Folder for identity.safetensors, scene.safetensors, attributes.safetensors and fish.safetensors."""
    only: Literal["identity", "scene", "attributes", "fish"] | None = None
    """Train this judge alone; the others must be there already."""
    training: Annotated[JudgeSettings, Inline] = JudgeSettings()


def main(config: Config) -> None:
    check_writable(config.out)
    for name in JUDGES:
        if config.only in (None, name):
            train_judge(name, config.training, config.out, progress)
    judges = load_judges(config.out)
    print(json.dumps({kind: validate_judges(judges, 0, split="validation", kind=kind) for kind in WHO_IS_IT}, indent=2))
