"""Pictures for domain pretraining as Grain datasets: the drawn world, any TFDS dataset, or a folder of pictures.

A row is `image` (float32 `[size, size, 3]` in [-1, 1]), `mask` (float32 `[size, size]`, ones where there is none),
`ids` and `placeholder` (a tokenised prompt). Rows are addressed by number, so a resumed run reads on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain.python as grain
import numpy as np

from e4t_jax.data.images import fit_square, read_image
from e4t_jax.errors import UserError

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


class FolderSource:
    """The pictures of a folder and its subfolders by number, in the order of their paths; `NAME.mask.png` is a mask, not a picture.

    Errors: `UserError` when the folder does not exist or holds no picture.
    """

    def __init__(self, folder: Path, size: int):
        if not Path(folder).is_dir():
            raise UserError(f"--data folder:{folder} is no folder; check the path.")
        found = (path for path in Path(folder).rglob("*") if path.suffix.lower() in _PICTURES)
        self.paths = sorted(path for path in found if not path.name.endswith(".mask.png"))
        self.size = size
        if not self.paths:
            raise UserError(f"--data folder:{folder} holds no picture ({', '.join(_PICTURES)}).")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, mask = read_image(self.paths[index], self.size)
        return {"image": image, "mask": np.ones(image.shape[:2], np.float32) if mask is None else mask}


def open_pictures(spec: str, size: int, data_dir: Path) -> grain.MapDataset:
    """Rows with `image`, `mask` and, where the data set has one, `caption` (str).

    `spec` is "creatures", "tfds:NAME" (prepared in `data_dir`; a feature `image` is needed) or "folder:DIR".

    Errors: `UserError` for another form, a folder without pictures, or a data set that is not there.
    """
    kind, _, name = spec.partition(":")
    if kind == "folder" and name:
        return grain.MapDataset.source(FolderSource(Path(name), size))
    if spec == "creatures":
        from e4t_jax.world.creatures import as_source

        source = as_source("train", data_dir)
    elif kind == "tfds" and name:
        source = _open_tfds(name, data_dir)
    else:
        raise UserError(f"--data {spec!r} is unknown; give creatures, tfds:NAME or folder:DIR.")

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        if "image" not in row:
            raise UserError(f"--data {spec} has no feature `image`, only {', '.join(row)}.")
        image = fit_square(np.asarray(row["image"]), size).astype(np.float32) / 127.5 - 1
        mask = fit_square(np.asarray(row["mask"])[..., 0], size) / 255 if "mask" in row else np.ones((size, size))
        converted = {"image": image, "mask": mask.astype(np.float32)}
        return converted | ({"caption": row["caption"].decode()} if "caption" in row else {})

    return grain.MapDataset.source(source).map(convert)


def _open_tfds(name: str, data_dir: Path):
    import tensorflow_datasets as tfds

    try:
        return tfds.data_source(name, split="train", data_dir=str(data_dir))
    except Exception as error:
        raise UserError(
            f"--data tfds:{name} cannot be opened in {data_dir} ({type(error).__name__}: {error})".splitlines()[0]
        ) from None


def training_batches(
    pictures: grain.MapDataset, tokenize: Tokenize, prompts: Sequence[str], batch_size: int, seed: int, *, first: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Shuffled batches `first`, `first + 1`, … without end; the prompt is the row's caption or a draw from `prompts`.

    Errors: `UserError` when there are fewer pictures than a batch holds.
    """
    if len(pictures) < batch_size:
        raise UserError(f"--batch-size {batch_size} is more than the {len(pictures)} pictures of --data; lower it.")
    tokens: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add_prompt(row: dict[str, Any], generator: np.random.Generator) -> dict[str, np.ndarray]:
        prompt = row.pop("caption", None) or prompts[int(generator.integers(len(prompts)))]
        if prompt not in tokens:
            ids, placeholder = tokenize([prompt])
            tokens[prompt] = ids[0], placeholder[0]
        return {**row, "ids": tokens[prompt][0], "placeholder": tokens[prompt][1]}

    rows = pictures.seed(seed).shuffle().repeat().random_map(add_prompt).batch(batch_size)
    ahead = rows[first:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    return iter(ahead)
