"""Model folders by name: a local folder, or a Hub id, taken from the cache where all of it is there, what lacks fetched once."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from e4t_jax.bases.formats import STEMS
from e4t_jax.errors import UserError, reason_of


class Needs(NamedTuple):
    """What a model is read from: files that it must have, files that are read where they are, and folders with weights."""

    files: tuple[str, ...]
    patterns: tuple[str, ...]
    parts: dict[str, str]  # part -> its folder and "/", or nothing


_OWN_EYES = "image_encoder/"  # of a base that brings CLIP's image encoder; Stable Diffusion's do not
BASE = Needs(
    ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in STEMS)),
    ("model_index.json", "tokenizer/*.json", "tokenizer/merges.txt"),
    {part: f"{part}/" for part in STEMS},
)
IMAGE_ENCODER = Needs(("config.json",), (), {"image_encoder": ""})


def find_folder(name: str | Path, argument: str, needs: Needs = BASE) -> Path:
    """The folder `name`, or the snapshot of the Hub's repository of that name, with all that it is read from.

    No connection is tried for a name that can only be a folder's, nor where the cache has everything. Of several formats of the
    same weights one is fetched, safetensors where it is there.

    Errors: `UserError` when it is neither, and when files that it needs are neither in the cache nor to be had.
    """
    path = Path(name)
    if str(name) and path.is_dir():
        return path
    if str(name) and path.exists():
        raise UserError(f"{name} is a file; give the folder of a model, or a Hub id such as owner/model.", argument)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise UserError(f"{name}: no such folder, and not a Hub id such as owner/model; check the spelling.", argument)
    advice = "check the name and the connection, or give a folder"
    try:
        cached = Path(snapshot_download(str(name), local_files_only=True))
        lacking = _choose(_files_in(cached), needs)[1]
        if not lacking:
            return cached
        state = f"the Hub's cache lacks {' and '.join(lacking)}, which"
    except (LocalEntryNotFoundError, HFValidationError):
        state = "it is neither a folder nor in the Hub's cache, and"
    try:
        wanted, lacking = _choose(list_repo_files(str(name)), needs)
        if not lacking:
            # All that is read, not the rest alone: the repository may have moved on, and files of two of its states do not mix.
            return Path(snapshot_download(str(name), allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = reason_of(error, 160)
        raise UserError(f"{name}: {state} could not be fetched ({reason}); {advice}.", argument) from None
    raise UserError(f"{name} is a repository without {' and '.join(lacking)}; give another.", argument)


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.exists() and not path.is_dir()]


def _choose(files: Sequence[str], needs: Needs) -> tuple[list[str], list[str]]:
    """Of a repository's files, those to read; and what is not among them, in words for a message."""

    def is_needed(name: str) -> bool:
        return not (needs is BASE and name.startswith(_OWN_EYES)) or f"{_OWN_EYES}config.json" in files

    chosen = [name for name in needs.files if name in files]
    lacking = [name for name in needs.files if name not in files and is_needed(name)]
    chosen += [name for name in files if any(fnmatch(name, pattern) for pattern in needs.patterns)]
    words = {name.removeprefix("tokenizer/") for name in chosen if name.startswith("tokenizer/")}
    if needs is BASE and "tokenizer.json" not in words and not {"vocab.json", "merges.txt"} <= words:
        lacking += [f"tokenizer/{name}" for name in ("vocab.json", "merges.txt") if name not in words]
    for part, where in needs.parts.items():
        if not is_needed(where):
            continue
        weights = _choose_weights([name.removeprefix(where) for name in files if name.startswith(where)], part)
        chosen += [f"{where}{name}" for name in weights]
        if not weights:
            lacking.append(f"{where}{STEMS[part][0]}.safetensors (whole, or in any other format)")
    return chosen, lacking


def _choose_weights(files: Sequence[str], part: str) -> list[str]:
    """The weights of a part in the first format that is there whole, with all shards and their index; in full precision first."""
    safe, torch, flax = STEMS[part]
    formats = [(safe, ".safetensors"), (torch, ".bin"), (flax, ".msgpack")]
    if importlib.util.find_spec("torch") is None:
        formats = [formats[0], formats[2], formats[1]]
    for stem, suffix in formats:
        for variant in ("", ".fp16"):
            if f"{stem}{variant}{suffix}" in files:
                return [f"{stem}{variant}{suffix}"]
            index = f"{stem}{suffix}.index{variant}.json"
            # diffusers and transformers have put the variant before and after the number.
            names = rf"{re.escape(stem)}(?:{re.escape(variant)})?-(\d+)-of-(\d+)(?:{re.escape(variant)})?{re.escape(suffix)}"
            shards = {name: match for name in files if (match := re.fullmatch(names, name))}
            if variant:
                shards = {name: match for name, match in shards.items() if variant in name}
            if index in files and shards and len(shards) == int(next(iter(shards.values()))[2]):
                return [index, *sorted(shards)]
    return []
