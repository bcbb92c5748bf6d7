"""Encodes pictures once, for any number of runs on them: `cache("creatures", "folder:cats", "cats_cache")`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key

from e4t_jax import registry
from e4t_jax.arrays import Array
from e4t_jax.bases import Base, LoadedBase
from e4t_jax.checks import BatchSize, Seed, Whole, Workers, check_ranges
from e4t_jax.data.augment import make_views
from e4t_jax.data.cache import MANIFEST, PARTS, Manifest, check_name, to_record, write_shard
from e4t_jax.data.prefetch import read_ahead
from e4t_jax.data.sources import Broken, open_pictures
from e4t_jax.errors import UserError
from e4t_jax.files.domain_files import base_fingerprint
from e4t_jax.files.places import local_data, local_path
from e4t_jax.image_inputs import Encoders, encode_pictures
from e4t_jax.pretraining.settings import Seen
from e4t_jax.storage import check_writable, locked, write_file
from e4t_jax.training.parallel import Layout, layout_for
from e4t_jax.training.processes import count_on_all, is_first, largest_of_all, share_of

if TYPE_CHECKING:
    import grain.python as grain

READ_BY_RUNS = ("unet", "text_encoder")  # the parts of a base that a run on a cache needs
_SHARD_ROWS = 4096
_THERE = "{} holds a cache already; give another folder."

Encode = Callable[[np.ndarray, np.ndarray, int], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class CacheSettings(Seen):
    """How pictures are encoded."""

    views: Annotated[int, Whole(1, 1000)] = 1
    """Views kept of each picture: itself first, then crops, every second one flipped."""
    batch_size: BatchSize = 16
    """Pictures encoded at once by each process, over its devices."""
    kept: Literal["float32", "float16"] = "float16"
    """What the numbers are kept in; float16 takes half the space, float32 gives the very losses of a run without cache."""
    workers: Workers = 0
    """Processes that read pictures ahead, beside each of the run's; 0: two of its threads."""
    seed: Seed = 0
    """Seed of the crops."""


def cache(
    base: str,
    data: str,
    out: str | Path,
    settings: CacheSettings | None = None,
    *,
    image_encoder: str | None = None,
    policy: Mapping[str, Any] | None = None,
    track: Callable[..., Any] = iter,
    say: Callable[[str], None] = warnings.warn,
) -> int:
    """Writes latents, φ_clip, masks and captions of all pictures of `data` into the folder `out`; gives the number of rows.

    Every process of a run makes the same call, and encodes each n-th shard on all of its devices.

    Errors: `UserError` for names that lead nowhere, settings out of range, and a folder that holds a cache or cannot be written.
    """
    out, data, settings = local_path(out, "out"), local_data(data), settings or CacheSettings()
    check_ranges(settings)
    where = layout_for(settings.batch_size, devices=jax.local_devices(), say=say)
    _check_request(data, out)
    loaded = settings.open(base, image_encoder, policy)
    broken = Broken(say)
    pictures = open_pictures(data, loaded.base.image_size, out / "data", broken)
    shapes = _row_shapes(loaded.base)
    if is_first():
        numbers = sum(int(np.prod(shape)) for shape in shapes.values())
        check_writable(out, needed=len(pictures) * settings.views * numbers * np.dtype(settings.kept).itemsize)
    out.mkdir(parents=True, exist_ok=True)
    with _alone_in(out):
        shards = _write_shards(out, pictures, broken, settings, _compiled_encoder(loaded, settings, where), track=track)
        count = count_on_all(broken.rows)
        manifest = Manifest.made_with(
            loaded.base,
            base_fingerprint(loaded.stored),
            data=data,
            pictures=len(pictures),
            broken=count,
            views=settings.views,
            dtype=settings.kept,
            shapes={part: list(shape) for part, shape in shapes.items()},
            shards=shards,
        )
        if is_first():
            write_file(out / MANIFEST, manifest.to_json())
    if count:
        say(f"{count} of the {len(pictures)} pictures of {data} could not be read and were skipped.")
    return manifest.rows


def _check_request(data: str, out: Path) -> None:
    """Errors: `UserError` for data that is encoded already, and a folder that holds a cache or cannot be written."""
    if data.startswith("cache:"):
        known = ", ".join(registry.names("data"))
        raise UserError(f"{data} is encoded already; give pictures: {known}, tfds:NAME, folder:DIR or MODULE:FUNCTION.", "data")
    check_name(out, "out")
    if (out / MANIFEST).exists():
        raise UserError(_THERE.format(out), "out")
    if is_first():
        check_writable(out)


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Errors: `UserError` where another run writes a cache into this folder, or has just done so."""
    if not is_first():
        yield
        return
    with locked(out, wait=False) as alone:
        if not alone:
            raise UserError(f"another process writes a cache into {out}; let it end, or give another folder.", "out")
        if (out / MANIFEST).exists():
            raise UserError(_THERE.format(out), "out")
        yield


def _row_shapes(base: Base) -> dict[str, tuple[int, ...]]:
    """Shapes of the `PARTS` of one row."""
    return {
        "latents": base.latent_shape,
        "clip": (base.image_encoder.count, base.image_encoder.width),
        "mask": base.latent_shape[:2],
    }


def _compiled_encoder(loaded: LoadedBase, settings: CacheSettings, where: Layout) -> Encode:
    """What encodes a batch of pictures, the first of which has the given number, over this process's devices."""
    weights = Encoders(loaded.params["vae"], loaded.params["image_encoder"])
    weights = jax.tree.map(lambda leaf: jax.device_put(leaf, where.sharding(leaf)), weights)
    compiled = jax.jit(partial(encode_views, loaded.base, views=settings.views, kept=settings.kept))

    def encode(images: np.ndarray, masks: np.ndarray, first: int) -> dict[str, np.ndarray]:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(settings.seed)))(first + jnp.arange(len(images)))
        return jax.device_get(compiled(weights, *(jax.device_put(one, where.batch_sharding()) for one in (images, masks, keys))))

    return encode


def _write_shards(
    out: Path,
    pictures: grain.MapDataset,
    broken: Broken,
    settings: CacheSettings,
    encode: Encode,
    *,
    track: Callable[..., Any],
) -> list[dict[str, Any]]:
    """Writes this process's shards; what the manifest says of all."""
    per_shard = max(1, _SHARD_ROWS // settings.views)
    spans = [range(first, min(first + per_shard, len(pictures))) for first in range(0, len(pictures), per_shard)]
    files = [f"rows-{number:05}.array_record" for number in range(len(spans))]
    digests = np.zeros((len(spans), 32), np.uint8)
    for number in track(share_of(range(len(spans)))):
        written = write_shard(out / files[number], _records(pictures, broken, spans[number], settings, encode))
        digests[number] = np.frombuffer(bytes.fromhex(written["sha256"]), np.uint8)
    return [
        {
            "file": file,
            "rows": len(span) * settings.views,
            "bytes": (out / file).stat().st_size,
            "sha256": digest.tobytes().hex(),
        }
        for file, span, digest in zip(files, spans, largest_of_all(digests), strict=True)
    ]


def encode_views(
    base: Base,
    weights: Encoders,
    images: Float[Array, "batch h w 3"],
    masks: Float[Array, "batch h w"],
    keys: Key[Array, " batch"],
    *,
    views: int,
    kept: str,
) -> dict[str, Array]:
    """`PARTS` of every view of a batch of pictures, each `[batch, views, …]`; the first view is the picture as it is."""

    def of_one(image: Array, mask: Array, key: Key[Array, ""]) -> tuple[Array, Array]:
        others, their_masks = make_views(image, mask, key, views)
        return jnp.concatenate([image[None], others[1:]]), jnp.concatenate([mask[None], their_masks[1:]])

    if views > 1:
        images, masks = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in jax.vmap(of_one)(images, masks, keys))
    encoded = encode_pictures(base, weights, images, masks)
    return {part: getattr(encoded, part).reshape(-1, views, *getattr(encoded, part).shape[1:]).astype(kept) for part in PARTS}


def _records(pictures: grain.MapDataset, broken: Broken, span: range, settings: CacheSettings, encode: Encode) -> Iterator[bytes]:
    """The records of a span of pictures, encoded batch by batch; the last batch is filled up with its last picture."""
    rows = map(broken.meet, read_ahead(pictures[span.start : span.stop], settings.workers, 2 * settings.batch_size))
    for first in range(span.start, span.stop, settings.batch_size):
        batch = list(itertools.islice(rows, settings.batch_size))
        filled = batch + batch[-1:] * (settings.batch_size - len(batch))
        encoded = encode(np.stack([row["image"] for row in filled]), np.stack([row["mask"] for row in filled]), first)
        for index, row in enumerate(batch):
            for view in range(settings.views):
                yield to_record({part: encoded[part][index, view] for part in PARTS}, row.get("caption", ""))
