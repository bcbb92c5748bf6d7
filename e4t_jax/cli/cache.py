"""Encodes pictures once, so that pretraining on them needs neither VAE nor CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import progress, say
from e4t_jax.cli.run import Inline, NetworkCommand
from e4t_jax.pretraining.encode_once import CacheSettings, cache
from e4t_jax.training.processes import Processes, is_first, joined


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Encode pictures into a folder that `e4t pretrain` takes as --data cache:DIR."""

    example = "e4t cache --base stable-diffusion-v1-5/stable-diffusion-v1-5 --data folder:cats --out cats_encoded"

    out: Path
    """Folder of the cache: cache.json and the shards; one that all processes see."""
    base: str = "creatures"
    """Base model, as `e4t pretrain` takes it."""
    image_encoder: str | None = None
    """CLIP's, as `e4t pretrain` takes it."""
    data: str = "creatures"
    """Pictures: creatures, fish, tfds:NAME, folder:DIR, or a source's MODULE:FUNCTION."""
    caching: Annotated[CacheSettings, Inline] = CacheSettings()
    processes: Annotated[Processes, Inline] = Processes()


def main(config: Config) -> None:
    with joined(config.processes):
        use_all_cores()
        rows = cache(
            config.base,
            config.data,
            config.out,
            config.caching,
            image_encoder=config.image_encoder,
            policy=config.policy(),
            track=lambda shards: progress(shards, "encoding", unit="shard", disable=not is_first()),
            say=say if is_first() else lambda line: None,
        )
        if is_first():
            print(f"{rows} rows are in {config.out}")
