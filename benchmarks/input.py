"""How fast pictures are read: the input of pretraining alone, without a step, by number of workers, and rows of a cache.

python benchmarks/input.py --workers 0 1 2 4

Draws JPEGs of 512×512 pixels into a folder (noise over gradients, some 100 kB each: no easier than photographs), reads them as
`train.pretrain --data folder:DIR` does, and then rows of a cache of Stable Diffusion 1.5's size as `--data cache:DIR` (latents
64×64×4, φ_clip of ViT-H/14, masks; float16). Batches, tokenised prompts among them, are taken as fast as they come. Prints a table
(rows a second, the same by core, and rows a second of CPU time where no worker hides it), and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from e4t_jax.creatures.learning.tokenizer import build_tokenizer
from e4t_jax.data.batches import training_batches
from e4t_jax.data.cache import MANIFEST, PARTS, Manifest, to_record, write_shard
from e4t_jax.data.sources import open_pictures
from e4t_jax.machine import core_count
from e4t_jax.templates import templates
from e4t_jax.words import tokenize

SIZE = 512
SHAPES = {"latents": [64, 64, 4], "clip": [16, 1280], "mask": [64, 64]}  # what the encoder sees of ViT-H/14, and Stable Diffusion's
_COLUMNS = (("rows_per_second", 10), ("rows_per_second_and_core", 10), ("rows_per_cpu_second", 15))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="processes that read, 0: two threads")
    parser.add_argument("--pictures", type=int, default=512, help="files, and rows of the cache")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=60, help="taken after as many as two for each worker, for which they start")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        draw_pictures(folder / "pictures", options.pictures)
        write_cache(folder / "cache", options.pictures)
        print(f"{'data':10}{'workers':>9}{'rows/s':>10}{'by core':>10}{'by CPU second':>15}")
        rows = []
        for data, count in ((f"folder:{folder / 'pictures'}", 1), (f"cache:{folder / 'cache'}", 20)):
            for workers in options.workers:
                row = {"data": data.partition(":")[0], "workers": workers}
                row |= measure(data, workers, options.batch_size, count * options.batches)
                rows.append(row)
                print(
                    f"{row['data']:10}{workers:9}" + "".join(f"{row.get(name, ''):>{width}}" for name, width in _COLUMNS),
                    flush=True,
                )
    print(json.dumps({"cores": core_count(), "size": SIZE, "batch_size": options.batch_size, "rows": rows}))


def measure(data: str, workers: int, batch_size: int, count: int) -> dict[str, float]:
    """Rows a second over `count` batches, once the workers are at work."""
    warm = 2 * max(workers, 2)
    words, last = Words(build_tokenizer()), warm + count + warm
    batches = training_batches(
        open_pictures(data, SIZE, "."), words, templates("neutral"), batch_size=batch_size, seed=0, last=last, workers=workers
    )
    exhaust(islice(batches, warm))
    began, busy = time.perf_counter(), time.process_time()
    exhaust(islice(batches, count))
    speed, busy = count * batch_size / (time.perf_counter() - began), time.process_time() - busy
    exhaust(batches)
    told = {"rows_per_second": round(speed, 1), "rows_per_second_and_core": round(speed / core_count(), 1)}
    return told if workers else {**told, "rows_per_cpu_second": round(count * batch_size / busy, 1)}


class Words:
    """The prompts' tokens, as a run's."""

    def __init__(self, tokenizer: object):
        self.tokenizer = tokenizer

    def __call__(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return tokenize(self.tokenizer, prompts)


def exhaust(batches: Iterable) -> None:
    for _ in batches:
        pass


def draw_pictures(folder: Path, count: int) -> None:
    """JPEGs of quality 90: soft shapes under noise."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (9, 9, 3), np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse, np.int16) + generator.integers(-16, 17, (SIZE, SIZE, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{index:05}.jpg", quality=90)


def write_cache(folder: Path, count: int) -> None:
    """Random rows; the files of `train.cache`."""
    folder.mkdir()
    generator = np.random.default_rng(0)

    def records():
        for _ in range(count):
            row = {part: generator.standard_normal(SHAPES[part]).astype(np.float16) for part in PARTS}
            yield to_record(row, "")

    shard = write_shard(folder / "rows-00000.array_record", records())
    what = {"base": "", "clip_features": "layers", "image_size": SIZE, "data": "noise", "pictures": count, "broken": 0}
    how = {"views": 1, "dtype": "float16", "computed_in": "float32", "shapes": SHAPES, "shards": [shard]}
    (folder / MANIFEST).write_text(Manifest(**what, **how).to_json())


if __name__ == "__main__":
    main()
