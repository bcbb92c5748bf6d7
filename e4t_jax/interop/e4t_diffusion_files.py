"""The files of a checkpoint of the public PyTorch implementation: read, with one line for what is wrong in one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from e4t_jax import bases
from e4t_jax.bases import Base, Params
from e4t_jax.checks import Between
from e4t_jax.errors import UserError, reason_of, shortened
from e4t_jax.interop.e4t_diffusion import State, differs


def read_number(file: Path, settings: Mapping[str, Any], name: str, within: Between, default: float) -> float:
    """A number of the checkpoint's settings.

    Errors: `UserError` where it is none, or out of range of what it is here.
    """
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in within:
        raise UserError(f"{file}: {name} = {shortened(value)} is out of range; it must be {within}.")
    return float(value)


def check_text_encoder(folder: Path, text_encoder: Params, base: str) -> None:
    """A domain reads its prompts with the base's text encoder: one that was trained on has to be part of the base.

    Errors: `UserError` where a text encoder lies beside the checkpoint that is not the base's.
    """
    path = folder / "text_encoder.pt"
    if not path.exists():
        return
    name = differs(read_state(path), text_encoder)
    if name:
        raise UserError(
            f"{path} is another text encoder than that of {base} ({name} differs); "
            "put it into text_encoder of a copy of the base, and give that.",
            "base",
        )


def read_state(path: Path) -> State:
    """All tensors of a .pt file, float32.

    Errors: `UserError` for a number that is not finite, and as `bases.load_pickled`.
    """
    state = {name: np.asarray(tensor.float().numpy()) for name, tensor in bases.load_pickled(path).items()}
    for name, tensor in state.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite; copy it again.")
    return state


@contextlib.contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Whatever NumPy and JAX say of tensors whose shapes do not go together, as a `UserError`."""
    try:
        yield
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path} holds tensors that do not go together ({reason_of(error)}); copy it again.") from None


def read_unet(path: Path, state: State, base: Base) -> Params:
    """All weights of a tuned U-Net, in our names."""
    weights = bases.Weights(path, {name: partial(state.__getitem__, name) for name in state})
    return bases.fill_part(weights, "unet", base.param_shapes()["unet"])
