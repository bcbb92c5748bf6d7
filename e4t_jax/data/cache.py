"""Encoded pictures on disk: what the loss sees of a picture, so that a run on them needs neither VAE nor CLIP.

    cache.json           what made them and what they are: base, φ_clip, sizes, counts, and a checksum of every shard
    rows-00000.array_record …

A record is z_0, φ_clip and the mask of one view of one picture, one after the other, and the caption in UTF-8 (empty where there
is none). Row `picture · views + view`: the views of a picture lie side by side, the first being the picture itself.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e4t_jax.bases import Base
from e4t_jax.errors import UserError, reason_of
from e4t_jax.storage import check_signed, file_digest, read_json, to_signed_json

MANIFEST = "cache.json"
PARTS = ("latents", "clip", "mask")
_FORMAT = 1
_MEND = "make the cache again"
# A row is read alone, wherever it lies; and numbers of a network hardly compress.
_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cache is."""

    base: str  # fingerprint of all four parts of the base
    clip_features: str
    image_size: int  # pixels
    data: str  # what was encoded
    pictures: int
    broken: int  # pictures that could not be read, with the next one in their place
    views: int  # of each picture
    dtype: str  # that numbers are kept in
    computed_in: str  # dtype of the networks
    shapes: dict[str, list[int]]  # of `PARTS`, of one row
    shards: list[dict[str, Any]]  # file, rows, bytes, sha256

    @classmethod
    def made_with(cls, base: Base, fingerprint: str, **others: Any) -> Manifest:
        """The manifest of a cache that this base made, whose weights have that fingerprint; `others` are all further fields."""
        seen, size = base.image_encoder.features, base.image_size
        return cls(base=fingerprint, clip_features=seen, image_size=size, computed_in=base.dtype, **others)

    @property
    def rows(self) -> int:
        """Rows of all shards: `views` of each picture."""
        return self.pictures * self.views

    def to_json(self) -> str:
        """The content of cache.json."""
        return to_signed_json({**dataclasses.asdict(self), "format": _FORMAT})


def read_manifest(folder: Path) -> Manifest:
    """Errors: `UserError` when cache.json is missing, damaged, changed or of a newer format."""
    path = folder / MANIFEST
    facts = read_json(path, "give a folder of encoded pictures, which `e4t cache` writes")
    check_signed(path, facts, _MEND)
    if facts.get("format") != _FORMAT:
        raise UserError(f"{path} is of format {facts.get('format')}, this version reads {_FORMAT}; {_MEND}.", "data")
    fields = [field.name for field in dataclasses.fields(Manifest)]
    missing = sorted({*fields, "checksum"} - facts.keys())
    if missing:
        raise UserError(f"{path} is damaged (it has no {missing[0]}); {_MEND}.", "data")
    return Manifest(**{name: facts[name] for name in fields})


def check_made_for(folder: Path, manifest: Manifest, base: Base, fingerprint: str) -> None:
    """Errors: `UserError` when a cache was made with another base, another φ_clip or another size than a run's."""
    wanted = {"clip_features": base.image_encoder.features, "image_size": base.image_size}
    for name, value in wanted.items():
        if getattr(manifest, name) != value:
            made = getattr(manifest, name)
            raise UserError(f"cache:{folder} was made with {name} = {made!r}, not {value!r}; make one for this run.", "data")
    if manifest.base != fingerprint:
        raise UserError(f"cache:{folder} was made with another base; give that base, or make a cache with this one.", "data")


def check_name(folder: Path, argument: str) -> None:
    """Errors: `UserError` for a folder whose name is not UTF-8, which is all that array_record reads and writes."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(f"{folder} is no name in UTF-8, as a cache needs; give a folder of another name.", argument) from None


class CachedRows:
    """The rows of a cache by number: `latents`, `clip`, `mask` and `caption`, for `grain.MapDataset.source`.

    Errors: `UserError` for a cache that is missing or whose shards are, of another length, and for a row that was changed.
    """

    def __init__(self, folder: Path):
        import grain.python as grain

        check_name(folder, "data")
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.paths = [folder / shard["file"] for shard in self.manifest.shards]
        for path, shard in zip(self.paths, self.manifest.shards, strict=True):
            if not path.is_file():
                raise UserError(f"{path} is missing; {_MEND}.", "data")
            if os.path.getsize(path) != shard["bytes"]:
                raise UserError(f"{path} is damaged (it has not the length it was written with); {_MEND}.", "data")
        try:
            self._source = grain.ArrayRecordDataSource([str(path) for path in self.paths])
            found = len(self._source)
        except Exception as error:  # the reader raises whatever the damage makes it raise
            raise UserError(f"{folder} is damaged ({reason_of(error)}); {_MEND}.", "data") from None
        if found != self.manifest.rows:
            raise UserError(f"{folder} holds {found} rows, not the {self.manifest.rows} of its {MANIFEST}; {_MEND}.", "data")

    def check(self, which: Sequence[int]) -> None:
        """Errors: `UserError` when one of these shards, by number, is not what its checksum says."""
        for number in which:
            if file_digest(self.paths[number]) != self.manifest.shards[number]["sha256"]:
                raise UserError(f"{self.paths[number]} was changed since it was written (its checksum differs); {_MEND}.", "data")

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._source[index]
        except Exception as error:
            raise UserError(f"{self.folder}: row {index} is damaged ({reason_of(error)}); {_MEND}.", "data") from None
        return from_record(record, self.manifest.shapes, self.manifest.dtype)


def to_record(row: Mapping[str, np.ndarray], caption: str) -> bytes:
    """One row as bytes."""
    return b"".join([*(np.ascontiguousarray(row[part]).tobytes() for part in PARTS), caption.encode()])


def from_record(record: bytes, shapes: Mapping[str, Sequence[int]], dtype: str) -> dict[str, Any]:
    """The row that `to_record` made bytes of."""
    row: dict[str, Any] = {}
    first = 0
    for part in PARTS:
        count = int(np.prod(shapes[part]))
        row[part] = np.frombuffer(record, dtype, count, first).reshape(shapes[part])
        first += row[part].nbytes
    return {**row, "caption": record[first:].decode()}


def write_shard(path: Path, records: Iterable[bytes]) -> dict[str, Any]:
    """Writes a shard, whole or not at all; gives what the manifest says of it.

    Errors: `UserError` when it cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    unfinished = path.with_name(f".{path.name}")
    try:
        writer = ArrayRecordWriter(str(unfinished), _OPTIONS)
        rows = 0
        try:
            for record in records:
                writer.write(record)
                rows += 1
        finally:
            writer.close()
        facts = {"file": path.name, "rows": rows, "bytes": os.path.getsize(unfinished), "sha256": file_digest(unfinished)}
        os.replace(unfinished, path)
    except (OSError, RuntimeError, ValueError) as error:  # the writer raises the last two
        raise UserError(f"Cannot write {path} ({reason_of(error)}); free some space or choose another folder.", "out") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return facts
