"""A domain in the public PyTorch code's own format, so that what was pretrained here runs, and is tuned, there.

    config.json           its settings          weight_offsets.pt  an offset network for every kernel (`nearest_network`)
    encoder.pt            encoder and CLIP      e4t_jax.safetensors  what the format cannot hold (`own_numbers`)

The public loader puts the tensors of weight_offsets.pt over the base's own before it makes the U-Net, so kernels may lie there too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from e4t_jax.bases import StableDiffusion
from e4t_jax.bases.stable_diffusion.names import to_torch
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError, reason_of
from e4t_jax.files.places import local_path
from e4t_jax.interop.e4t_diffusion.nearest_network import bounded, making_up, nearest_network
from e4t_jax.interop.e4t_diffusion.own_numbers import FILE, pack_own_numbers
from e4t_jax.interop.e4t_diffusion.settings import config_of, image_encoder_config
from e4t_jax.interop.e4t_diffusion.tensors import State
from e4t_jax.interop.e4t_diffusion.write_tensors import encoder_state, image_encoder_state, module_name, offsets_state
from e4t_jax.interop.model_card import check_not_lost, domain_readme
from e4t_jax.offsets import OffsetNetwork, delta, factors_of_network
from e4t_jax.storage import check_writable, move_files, temporary_folder, to_json, write_file

_EXACT = 1e-5  # a relative error that is rounding
_VISION_WIDTH, _FEATURES = 1280, 10880  # of ViT-H/14 and of Stable Diffusion's U-Nets: the public code's classes are made for them
_network_factors = jax.jit(factors_of_network)


class ExportedDomain(NamedTuple):
    """What was written to `folder`; `error` is what the offset networks miss of Δ by themselves, `notes` say what to know."""

    folder: Path
    error: float
    notes: tuple[str, ...]


class _Offsets(NamedTuple):
    """weight_offsets.pt: the networks and, where they miss something, the kernels that make up for it."""

    state: State
    error: float


def export_domain(domain: Domain, out: str | Path) -> ExportedDomain:
    """Writes a domain as a checkpoint of the public PyTorch code (mkshing/e4t-diffusion): all of it, or nothing.

    Imported again (`import_checkpoint`), it has the same numbers bit by bit.

    Args:
        domain: A domain in float32 whose encoder sees tokens of CLIP's last layer.
        out: Folder to write. Needs PyTorch.

    Errors: `UserError` without PyTorch, for a domain that the format cannot hold, and for a folder that cannot be written.
    """
    out = local_path(out, "out")
    _check_pytorch()
    base = _check_domain(domain)
    check_writable(out)
    check_not_lost(out, ("config.json", "README.md"))
    own = {name: out / name for name in ("encoder.pt", "weight_offsets.pt")}
    if not (out / "config.json").exists() and any(path.exists() for path in own.values()):
        raise UserError(f"{out} holds another checkpoint; choose another folder.", "out")
    tower = image_encoder_state(domain.params["image_encoder"])
    config = config_of(domain, base, image_encoder_config(base, tower))
    offsets = _offsets(domain, base)
    notes = _notes(domain, base, offsets.error)
    with temporary_folder(out / "unfinished") as made:
        _save(made / "encoder.pt", {**tower, **encoder_state(domain.encoder)})
        _save(made / "weight_offsets.pt", offsets.state)
        write_file(made / FILE, pack_own_numbers(domain, made / "weight_offsets.pt"))
        write_file(made / "config.json", to_json(config))
        write_file(made / "README.md", domain_readme(domain, notes))
        move_files(made, out)
    return ExportedDomain(out, offsets.error, notes)


def _check_pytorch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError(
            "the public code's files are PyTorch's own and need it to be written; pip install 'e4t-jax[reference]'."
        ) from None


def _check_domain(domain: Domain) -> StableDiffusion:
    """The domain's base. Errors: `UserError` for a domain that the format cannot hold."""
    base = domain.base
    if not isinstance(base, StableDiffusion):
        raise UserError(f"{domain.base_name} is a {type(base).__name__}; the public code knows Stable Diffusion only.", "domain")
    if not domain.base.image_encoder.features.endswith("tokens"):
        raise UserError(
            f"its encoder sees {base.image_encoder.features} of CLIP, the public code's sees tokens of the last layer alone: "
            "pretrain on tokens, or export concepts of it, which need no encoder.",
            "domain",
        )
    if base.dtype != "float32":
        raise UserError(f"it is loaded in {base.dtype}, which would be written; load it in float32.", "domain")
    lacking = sorted(set(base.offset_kernels(domain.params["unet"])) - set(domain.factors))
    if lacking:
        raise UserError(
            f"it has no offsets of {lacking[0]}: those of a tuned checkpoint are its concept's; export a pretrained one.", "domain"
        )
    return base


def _offsets(domain: Domain, base: StableDiffusion) -> _Offsets:
    """The domain's own networks where it has them, else the nearest to its factors."""
    kept = domain.networks() if domain.networks is not None else {}
    networks = dict(kept) or {name: nearest_network(factors) for name, factors in domain.factors.items()}
    missed = total = 0.0
    kernels: dict[str, np.ndarray] = {}
    for name, kernel in base.offset_kernels(domain.params["unet"]).items():
        wanted = np.asarray(delta(domain.factors[name]))
        said = _delta_of(networks[name])
        if np.linalg.norm(wanted - said) > _EXACT * np.linalg.norm(wanted):
            networks[name] = bounded(networks[name])
            said = _delta_of(networks[name])
            kernels[f"{module_name(name)}.weight"] = to_torch("/kernel", making_up(kernel, wanted, said))
        missed += float(np.square(wanted - said, dtype=np.float64).sum())
        total += float(np.square(wanted, dtype=np.float64).sum())
    return _Offsets({**offsets_state(networks), **kernels}, (missed / max(total, 1e-300)) ** 0.5)


def _delta_of(network: OffsetNetwork) -> np.ndarray:
    return np.asarray(delta(_network_factors(network)))


def _save(path: Path, state: State) -> None:
    """A .pt file. Errors: `UserError` where it cannot be written, or a number is not finite."""
    import torch

    bad = next((name for name, tensor in state.items() if not np.isfinite(tensor).all()), None)
    if bad is not None:
        raise UserError(f"{bad} holds numbers that are not finite; train at a lower learning rate.", "domain")
    try:
        with open(path, "wb") as file:
            torch.save({name: torch.from_numpy(np.array(tensor)) for name, tensor in state.items()}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's writer on a full disk
        raise UserError(f"Cannot write {path}: {reason_of(error)}; choose another folder or free some space.") from None


def _notes(domain: Domain, base: StableDiffusion, error: float) -> tuple[str, ...]:
    """What to know of the checkpoint, a line each."""
    notes = []
    if error > _EXACT:
        notes.append(
            "Its offsets are free in three factors, the public code's networks in two: weight_offsets.pt holds the nearest, which "
            f"miss {error:.1%} of Δ, and the kernels that make up for it, so that the U-Net is the same."
        )
    normed = domain.base.image_encoder.features == "bicubic-normed-tokens"
    notes.append(
        f"Use OpenCLIP {'2.23 or later, which norms all tokens' if normed else 'before 2.23, which norms the first token'}."
    )
    if domain.base.image_encoder.features == "tokens":
        notes.append(
            "Its encoder learned from cropped pictures, resized with antialiasing; the public code squashes whole ones without it: "
            "square pictures come nearest."
        )
    if (base.image_encoder.width, base.feature_width) != (_VISION_WIDTH, _FEATURES):
        notes.append(
            f"The public code's encoder is made for CLIP's width {_VISION_WIDTH} and {_FEATURES} features of the U-Net, these are "
            f"{base.image_encoder.width} and {base.feature_width}: change the numbers in its e4t/encoder.py."
        )
    return tuple(notes)
