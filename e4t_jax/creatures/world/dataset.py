"""The drawn world as a TFDS dataset in ArrayRecord files, for pipelines of Grain; TensorFlow is neither needed nor imported.

source = as_source("train", data_dir)
batches = grain.MapDataset.source(source).shuffle(seed=0).batch(16)

Row i of a split shows identity i of `sample_identities(seed, count, split=...)` once, in scene i of `sample_scenes`.
Counts belong to the random streams: another count draws other pictures, so both are part of the config's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from e4t_jax.creatures.world.attributes import CLASSES, CONTEXTS, STYLES, of_class, sample_identities, sample_scenes, take
from e4t_jax.creatures.world.captions import sentence
from e4t_jax.creatures.world.renderer import IMAGE_SIZE, render
from e4t_jax.data.images import encode_png
from e4t_jax.errors import UserError
from e4t_jax.storage import check_writable, locked
from e4t_jax.words import PLACEHOLDER

SPLITS = ("train", "validation", "test")
_CHUNK = 256  # pictures drawn at once: the renderer's own chunk, so that it compiles once


@dataclasses.dataclass(kw_only=True)
class CreaturesConfig(tfds.core.BuilderConfig):
    """How many pictures each split holds, of which class, and the seed; the name tells them apart on disk."""

    name: str = ""
    kind: str = "creature"  # the class that is shown
    seed: int = 0
    train: int = 32768
    validation: int = 256
    test: int = 256

    def __post_init__(self):
        if self.kind not in CLASSES:
            raise UserError(f"There is no class {self.kind!r}; choose {', '.join(CLASSES)}.")
        for split in SPLITS:
            if getattr(self, split) < 1:
                raise UserError(f"The split {split} needs at least one picture, not {getattr(self, split)}.")
        kind = "" if self.kind == "creature" else f"{self.kind}_"
        self.name = self.name or f"{kind}seed{self.seed}_{self.train}_{self.validation}_{self.test}"


class Creatures(tfds.core.GeneratorBasedBuilder):
    """One picture of each identity with its mask, and a caption that puts the placeholder in its stead."""

    name = "creatures"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (TFDS's own interface)
    BUILDER_CONFIGS = [CreaturesConfig(), CreaturesConfig(kind="fish")]  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="png"),
            "mask": tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 1), encoding_format="png"),
            "caption": tfds.features.Text(),
            "identity": tfds.features.Scalar(np.int64),
            "context": tfds.features.ClassLabel(names=list(CONTEXTS)),
            "style": tfds.features.ClassLabel(names=list(STYLES)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedurally drawn creatures, or fish, of 32 by 32 pixels with masks and captions.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # row i is identity i
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        seed, count = self.builder_config.seed, getattr(self.builder_config, split)
        identities = sample_identities(seed, count, split=split)
        scenes = sample_scenes(seed, count, split=split, **of_class(self.builder_config.kind))
        for start in range(0, count, _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, count))
            images, masks = render(take(identities, rows), take(scenes, rows))
            for row, image, mask in zip(rows.tolist(), images, masks, strict=True):
                context, style = int(scenes["context"][row]), int(scenes["style"][row])
                yield (
                    row,
                    {
                        # Arrays would be encoded by TensorFlow; bytes are stored as they come.
                        "image": encode_png(image),
                        "mask": encode_png(mask),
                        "caption": sentence(style, PLACEHOLDER, context, [], named=True),
                        "identity": row,
                        "context": context,
                        "style": style,
                    },
                )


def prepare(data_dir: str | Path, config: CreaturesConfig | None = None) -> Creatures:
    """Draws the dataset into `data_dir`, unless it is there already; an interrupted call leaves nothing that looks whole.

    Of several processes that ask for it at once, one draws it and the others wait.

    Errors: `UserError` when the folder cannot be written.
    """
    data_dir = check_writable(Path(data_dir), argument="work")
    # By its name, where TFDS knows the config: it takes an equal one for another of the same name, a copy in a worker process too.
    known = config.name if config is not None and config.name in Creatures.builder_configs else config

    def opened() -> Creatures:
        return Creatures(data_dir=str(data_dir), config=known, file_format="array_record")

    data_dir.mkdir(parents=True, exist_ok=True)
    with locked(data_dir):
        builder = opened()
        try:
            builder.download_and_prepare()
        except OSError as error:
            # Where a file system has no locks, another process may have been the first to move its own there.
            builder = opened()
            if not builder.is_prepared():
                raise UserError(f"Cannot write {data_dir}: {error.strerror or error}; choose another folder.", "work") from None
    return builder


def as_source(split: str, data_dir: str | Path, config: CreaturesConfig | None = None):
    """The split ("train", "validation" or "test") for `grain.MapDataset.source`: `len` and random access to dicts of NumPy arrays.

    The caption of a row is bytes, as TFDS reads text.

    Errors: `UserError` for an unknown split, or a folder that cannot be written.
    """
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r}; choose {', '.join(SPLITS)}.")
    return prepare(data_dir, config).as_data_source(split)


def open_creatures(data_dir: str | Path):
    """The split to learn from, for `registry`."""
    return as_source("train", data_dir)


def open_fish(data_dir: str | Path):
    """The same of the second domain."""
    return as_source("train", data_dir, CreaturesConfig(kind="fish"))
