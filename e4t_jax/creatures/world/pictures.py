"""The base model's training pictures: drawn once, kept as arrays in a work folder, captioned on the fly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from e4t_jax.creatures.world.attributes import CLASSES, Record, sample_identities, sample_relatives, sample_scenes, take
from e4t_jax.creatures.world.renderer import IMAGE_SIZE, render
from e4t_jax.errors import UserError
from e4t_jax.storage import check_writable, locked, write_file

_CREATURES = 0.7  # share of the creature among the classes
_SHARD = 2048


def records(seed: int, count: int, split: str = "train") -> tuple[Record, Record]:
    """Identities and scenes of the pictures `0 … count - 1`; every picture shows an identity of its own."""
    generator = np.random.default_rng([seed, 3])
    others = generator.integers(1, len(CLASSES), count)
    kinds = np.where(generator.uniform(size=count) < _CREATURES, 0, others)
    scenes = sample_scenes(seed, count, split=split, **{"class": kinds})
    return sample_identities(seed, count, split=split), scenes


def draw_pictures(folder: Path, seed: int, count: int, track) -> np.ndarray:
    """uint8 `[count, size, size, 3]`, memory-mapped; continues where an earlier call stopped. `track` wraps the shards.

    Of several processes that ask for them at once, one draws them and the others wait.

    Errors: `UserError` when the folder cannot be written or has no room for them.
    """
    check_writable(folder, argument="work")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        return _draw_pictures(folder, seed, count, track)


def _draw_pictures(folder: Path, seed: int, count: int, track) -> np.ndarray:
    # The name says whose pictures they are: another seed or count draws others.
    path, done = folder / f"pictures_{seed}_{count}.npy", folder / f"pictures_{seed}_{count}.done"
    shape = (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    size = int(np.prod(shape))
    there = path.exists() and done.exists() and path.stat().st_size > size
    # A mapped file on a disk that fills ends the process without a word.
    check_writable(folder, argument="work", needed=0 if there else size)
    identities, scenes = records(seed, count)
    try:
        first = int(done.read_text()) if there else 0
        pictures = np.lib.format.open_memmap(path, mode="r+" if there else "w+", dtype=np.uint8, shape=shape)
    except ValueError:
        raise UserError(f"{path} or {done.name} beside it is damaged; delete both.") from None
    for start in track(range(first, count, _SHARD)):
        rows = np.arange(start, min(start + _SHARD, count))
        pictures[rows] = render(take(identities, rows), take(scenes, rows))[0]
        pictures.flush()
        write_file(done, str(rows[-1] + 1))
    return pictures


def shuffled(count: int, batch_size: int, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Indices of batch `first`, `first + 1`, …: a new permutation every epoch, so that a resumed run sees the same batches."""
    per_epoch = count // batch_size
    step = first
    while True:
        order = np.random.default_rng([seed, step // per_epoch]).permutation(count)
        for position in range(step % per_epoch, per_epoch):
            yield order[position * batch_size : (position + 1) * batch_size]
            step += 1


def look_alikes(seed: int, step: int, count: int) -> tuple[Record, Record]:
    """Identities and scenes of batch `step` for contrast: three in four are creatures of one context and style, relatives.

    Among pictures that differ in place and medium, a model need not look at anything else to tell which caption is whose;
    and among strangers, a few attributes tell them apart. Relatives share half of theirs, another half in every batch. The
    fourth batch is mixed, so that places, media and classes are learned too.
    """
    own_seed = int(np.random.default_rng([seed, 13, step]).integers(2**40))
    if step % 4 == 3:
        return records(own_seed, count)
    scenes = sample_scenes(own_seed, count)
    scenes |= {name: np.full_like(scenes[name], scenes[name][0]) for name in ("context", "style")}
    return sample_relatives(own_seed, count), scenes


def as_floats(pictures: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1.0
