"""Trains the embedded world's base model from scratch, or checks it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax

from e4t_jax.bases import load_folder
from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import progress, say
from e4t_jax.cli.run import Command, Inline
from e4t_jax.creatures.learning.base_config import new_base
from e4t_jax.creatures.learning.base_stages import BaseSettings, train_base
from e4t_jax.creatures.learning.ladder import climb
from e4t_jax.creatures.shipped import base_folder
from e4t_jax.errors import UserError
from e4t_jax.storage import check_writable


@dataclass(frozen=True)
class Config(Command):
    """Train the base model of the embedded world "creatures" and write a diffusers folder, or check one."""

    example = "e4t train-base --out outputs/new_base"

    out: Path | None = None
    """Folder to write (diffusers layout, float16 safetensors), or to check; the shipped base is checked where not given."""
    work: Path = Path("outputs/base")
    """Folder for pictures and checkpoints; a stopped run continues from it."""
    start: Path | None = None
    """Base to start from instead of random weights; stages with 0 steps keep its weights."""
    check: bool = False
    """Do not train: measure rungs 1 to 3 of the ladder on the base at --out and print them as JSON."""
    training: Annotated[BaseSettings, Inline] = BaseSettings()


def main(config: Config) -> None:
    use_all_cores()
    if config.check:
        print(json.dumps(climb(config.out or base_folder(), track=progress), indent=2))
        return
    if config.out is None:
        raise UserError("there is none; give a folder to write, or --check.", "out")
    check_writable(config.out)
    check_writable(config.work, argument="work")
    base, params = load_folder(config.start) if config.start else new_base(jax.random.key(config.training.seed))
    train_base(base, params, config.training, out=config.out, work=config.work, track=progress, say=say)
    print(f"Wrote {config.out}")
