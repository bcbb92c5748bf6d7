"""Where a checkpoint and its base lie: folders, or repositories on the Hub, fetched after one line that says how much it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from e4t_jax import registry
from e4t_jax.bases.hub import Needs, announce, current_name, fetch, find_folder, find_local, is_hub_id, plan_fetch
from e4t_jax.errors import UserError
from e4t_jax.interop.e4t_diffusion.settings import CheckpointSettings, read_settings
from e4t_jax.interop.e4t_diffusion.trained_on import default_base

CONFIG = "config.json"
PICTURE = "domain.png"  # beside a tuned checkpoint: the picture it was tuned on, as the public code cropped it
_SETTINGS = Needs((CONFIG,), (), {})
_CHECKPOINT = Needs((CONFIG, "encoder.pt"), (PICTURE, "text_encoder.pt"), {}, one_of=("weight_offsets.pt", "unet.pt"))


class Located(NamedTuple):
    """A checkpoint whose files are here, and its base by name, whose files are here too where it has any."""

    folder: Path
    settings: CheckpointSettings
    base: str


def check_pytorch() -> None:
    """Errors: `UserError` where PyTorch is not installed: a checkpoint's format is its own."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("checkpoints of the public code need PyTorch to be read; pip install 'e4t-jax[reference]'.", "reference")


def locate(reference: str | Path, base: str | None = None, revision: str | None = None) -> Located:
    """The checkpoint `reference`, a folder or a Hub id, and its base: the one given, or else the one that config.json names.

    What the Hub's cache lacks is fetched, after one line on the error stream; nobody is asked where it lacks nothing.

    Errors: `UserError` for names that lead nowhere, and for what is not to be had.
    """
    if revision is not None and Path(reference).is_dir():
        raise UserError(f"{reference} is a folder, which has none; leave it out.", "revision")
    described = find_local(reference, "reference", _SETTINGS, revision)
    if described is None:
        described = fetch(plan_fetch(str(reference), "reference", _SETTINGS, revision), "reference")
    settings = read_settings(described / CONFIG)
    base = default_base(described / CONFIG, settings) if base is None else current_name(base)
    wanted = []
    if find_local(reference, "reference", _CHECKPOINT, revision) is None:
        wanted.append(("reference", plan_fetch(str(reference), "reference", _CHECKPOINT, revision)))
    if _is_on_hub(base) and find_local(base, "base") is None:
        wanted.append(("base", plan_fetch(base, "base")))
    if wanted:
        announce([one for _, one in wanted])
    for argument, one in wanted:
        fetch(one, argument)
    return Located(find_folder(reference, "reference", _CHECKPOINT, revision), settings, base)


def _is_on_hub(base: str) -> bool:
    return registry.find("base", base) is None and not Path(base).exists() and is_hub_id(base)
