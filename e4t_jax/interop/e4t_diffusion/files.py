"""The .pt files of a checkpoint: read and checked, with one line for what is wrong in one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from e4t_jax import bases
from e4t_jax.bases import Base, Params, torch_name
from e4t_jax.bases.stable_diffusion.names import to_torch
from e4t_jax.errors import UserError, reason_of
from e4t_jax.interop.e4t_diffusion.tensors import State

_HALF = 2e-3  # what half precision may lose of the largest entry, twice


class CheckpointFile(Mapping[str, np.ndarray]):
    """The tensors of a .pt file by name, float32; each is read from the file, and checked, when it is asked for.

    Errors: `UserError` as `bases.load_pickled`, and for a tensor with numbers that are not finite.
    """

    def __init__(self, path: Path):
        self._path = path
        self._tensors: dict[str, Any] = bases.load_pickled(path)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = np.asarray(self._tensors[name].detach().float().numpy())
        if not np.isfinite(tensor).all():
            raise UserError(f"{self._path}: {name} holds numbers that are not finite; copy it again.")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@contextlib.contextmanager
def tensor_errors_as_one_line(path: Path) -> Iterator[None]:
    """What NumPy and JAX raise for tensors whose shapes do not go together, as a `UserError`."""
    try:
        yield
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path} holds tensors that do not go together ({reason_of(error)}); copy it again.") from None


def read_unet(path: Path, state: State, base: Base) -> Params:
    """All weights of a tuned U-Net, by their names here.

    Errors: `UserError` for weights that are missing or of other shapes than the base's.
    """
    weights = bases.Weights(path, {name: partial(state.__getitem__, name) for name in state})
    return bases.fill_part(weights, "unet", base.param_shapes()["unet"])


def check_text_encoder(folder: Path, text_encoder: Params, base: str) -> None:
    """A domain reads its prompts with the base's text encoder: one that was trained on has to be part of the base.

    Errors: `UserError` where the text encoder beside the checkpoint is not the base's.
    """
    path = folder / "text_encoder.pt"
    if not path.exists():
        return
    name = _first_difference(CheckpointFile(path), text_encoder)
    if name:
        raise UserError(
            f"{path} is another text encoder than that of {base} ({name} differs); "
            "put it into text_encoder of a copy of the base, and give that.",
            "base",
        )


def _first_difference(state: State, text_encoder: Params) -> str | None:
    """The first weight of a checkpoint's text encoder that is not the base's, to half precision; None where all are.

    The word that the public code adds for the placeholder, after all others, is no difference.
    """
    for path, leaf in sorted(flatten_dict(text_encoder["text_model"], sep="/").items()):
        name = f"text_model.{torch_name('text_encoder', path)}"
        stored = state.get(name, state.get(name.removeprefix("text_model.")))
        if stored is None:
            return name
        ours = to_torch(path, np.asarray(leaf, np.float32))
        theirs = np.asarray(stored, np.float32)
        theirs = theirs[: len(ours)] if path.endswith("token_embedding/embedding") else theirs
        if theirs.shape != ours.shape or np.abs(theirs - ours).max() > _HALF * max(1e-3, np.abs(ours).max()):
            return name
    return None
