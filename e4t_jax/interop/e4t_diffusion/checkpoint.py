"""A whole checkpoint as a domain, or as a domain and a concept.

Newer checkpoints hold less: no image encoder, which is OpenCLIP's ViT-H/14 as it was published; of a tuned one, the offsets alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from e4t_jax import bases
from e4t_jax.bases import Params
from e4t_jax.concept import Concept
from e4t_jax.data.images import read_image
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError, shortened
from e4t_jax.files.concept_files import concept_bytes
from e4t_jax.files.domain_files import misfit, save_domain
from e4t_jax.interop.e4t_diffusion.files import check_text_encoder, read_state, read_unet, tensor_errors_as_one_line
from e4t_jax.interop.e4t_diffusion.own_numbers import FILE, read_own_numbers
from e4t_jax.interop.e4t_diffusion.settings import CheckpointSettings, read_settings
from e4t_jax.interop.e4t_diffusion.tensors import State, read_encoder, read_image_encoder, read_offsets
from e4t_jax.objective import Trainable, fold
from e4t_jax.offsets import Factors
from e4t_jax.storage import check_writable, temporary_folder, to_json, write_file

# Version of OpenCLIP -> (what the encoder sees of CLIP, in words: which tokens the last layer's norm is applied to).
_OPEN_CLIP = {"before-2.23": ("bicubic-tokens", "the first token"), "2.23-or-later": ("bicubic-normed-tokens", "all tokens")}
_IMAGE_ENCODER = "image_encoder"  # the folder in that of the domain


class ImportedCheckpoint(NamedTuple):
    """What was written to `folder`: a domain and, of a tuned checkpoint, the concept in it; `notes` say what was assumed."""

    folder: Path
    domain: Domain
    concept: Concept | None
    notes: tuple[str, ...]


class _Parts(NamedTuple):
    """The tensors of a checkpoint."""

    encoder: Params
    image_encoder: dict[str, bytes | str]  # its files by name; none of a newer checkpoint
    factors: Factors
    offsets_file: Path
    state: State  # of that file
    settings: Mapping[str, Any] | None  # of a domain that was exported from here: fields of `Domain`


def import_checkpoint(
    reference: str | Path,
    base: str,
    out: str | Path,
    *,
    image_encoder: str | None = None,
    image: str | Path | None = None,
    open_clip: str = "before-2.23",
) -> ImportedCheckpoint:
    """Writes the domain of a checkpoint of the public PyTorch implementation, and of a tuned one the concept: all, or nothing.

    Args:
        reference: Folder of weight_offsets.pt (or unet.pt), encoder.pt and config.json; reading them needs PyTorch.
        base: The base model it was trained on, as `load_base` takes it.
        out: Folder of the domain.
        image_encoder: CLIP's, as `load_base` takes it, for a checkpoint that does not contain it.
        image: For a tuned checkpoint, the picture it was tuned on; the concept is named after it.
        open_clip: The version of OpenCLIP it was trained with, "before-2.23" or "2.23-or-later": from 2.23 on it norms all tokens,
            before the first alone.

    Errors: `UserError` for files that are missing, damaged or of another base, and for a folder that cannot be written.
    """
    reference, out = Path(reference), Path(out)
    if not reference.is_dir():
        raise UserError(f"{reference} is no folder; give that of a checkpoint.", "reference")
    settings = read_settings(reference / "config.json")
    _check_arguments(reference, settings, image, open_clip)
    check_writable(out)
    parts = _read_parts(reference, settings, image_encoder)
    domain = _assemble(settings, parts, base, out, image_encoder, _OPEN_CLIP[open_clip][0])
    check_text_encoder(reference, domain.params["text_encoder"], base)
    _check_fits(reference, domain)
    beside: dict[str, bytes | str] = {f"{_IMAGE_ENCODER}/{name}": content for name, content in parts.image_encoder.items()}
    concept = None
    if image is not None:
        domain = dataclasses.replace(domain, factors={})  # all of them are the concept's
        concept = _concept(Path(image), domain, parts)
        beside[f"{concept.name}.safetensors"] = concept_bytes(concept, np.float32)
    save_domain(out, domain, np.float32, beside=beside)  # numbers made elsewhere are kept as they are
    notes = _notes(settings, open_clip) if parts.settings is None else (f"Read with the numbers it was exported with ({FILE}).",)
    return ImportedCheckpoint(out, domain, concept, notes)


def _check_arguments(reference: Path, settings: CheckpointSettings, image: str | Path | None, open_clip: str) -> None:
    if settings.is_tuned and image is None:
        raise UserError(f"{reference} is a tuned concept; give the picture it was tuned on.", "image")
    if not settings.is_tuned and image is not None:
        raise UserError(f"{reference} is no tuned concept; leave it out.", "image")
    if open_clip not in _OPEN_CLIP:
        raise UserError(f"{open_clip!r} is unknown; choose one of {', '.join(_OPEN_CLIP)}.", "open_clip")


def _read_parts(reference: Path, settings: CheckpointSettings, image_encoder: str | None) -> _Parts:
    encoder_file = reference / "encoder.pt"
    state = read_state(encoder_file)
    with tensor_errors_as_one_line(encoder_file):
        encoder = read_encoder(state, encoder_file.name)
        image_encoder_files = _image_encoder_files(encoder_file, state, settings, image_encoder)
    unet_file = reference / "unet.pt"
    offsets_file = unet_file if settings.is_tuned and unet_file.exists() else reference / "weight_offsets.pt"
    state = read_state(offsets_file)
    with tensor_errors_as_one_line(offsets_file):
        factors = read_offsets(state, offsets_file.name)
    own = None if settings.is_tuned else read_own_numbers(offsets_file)
    if own is None and not settings.is_tuned and any(re.search(r"\.to_[qkv]\.weight$", name) for name in state):
        raise UserError(f"{offsets_file} holds kernels that belong to its offsets; give it with the {FILE} it was exported with.")
    factors, own_settings = own or (factors, None)
    return _Parts(encoder, image_encoder_files, factors, offsets_file, state, own_settings)


def _image_encoder_files(
    file: Path, state: State, settings: CheckpointSettings, image_encoder: str | None
) -> dict[str, bytes | str]:
    """The files of CLIP's image encoder that a checkpoint contains; none for a newer one, which is saved without.

    Errors: `UserError` where it contains one, and one is given.
    """
    if not any(name.startswith("clip_vision.") for name in state):
        return {}
    if image_encoder is not None:
        raise UserError(f"{file} contains one; leave it out.", "image_encoder")
    config, tensors = read_image_encoder(state, file.name, settings.image_encoder)
    config |= settings.image_encoder_config
    return {"model.safetensors": save(tensors, {"format": "pt"}), "config.json": to_json(config)}


def _assemble(
    settings: CheckpointSettings, parts: _Parts, base_name: str, out: Path, image_encoder: str | None, clip_features: str
) -> Domain:
    """The domain on its base, which is read with the checkpoint's own image encoder where it contains one."""
    with temporary_folder(out / _IMAGE_ENCODER) as folder:
        for name, content in parts.image_encoder.items():
            write_file(folder / name, content)
        base, params = bases.load_base(base_name, str(folder) if parts.image_encoder else image_encoder)
    domain = Domain(
        base_name,
        settings.domain_token,
        base,
        params,
        parts.encoder,
        parts.factors,
        scale=settings.scale,
        regularisation=settings.regularisation,
        template=settings.template,
        image_encoder=_IMAGE_ENCODER if parts.image_encoder else image_encoder,
        clip_features=clip_features,
    )
    return dataclasses.replace(domain, **(parts.settings or {}))


def _check_fits(reference: Path, domain: Domain) -> None:
    """Errors: `UserError` for a checkpoint of another base or image encoder, or one that lacks offsets of some layers."""
    part = misfit(domain, domain.base.feature_width)
    kernels = domain.base.offset_kernels(domain.params["unet"])
    if part or set(domain.factors) != set(kernels):
        raise UserError(f"the {part or 'offsets'} of {reference} do not fit it; give the base it was trained on.", "base")


def _concept(image: Path, domain: Domain, parts: _Parts) -> Concept:
    """The concept of a tuned checkpoint: its offsets, its U-Net where it has its own, and the picture as the encoder sees it."""
    has_unet = parts.offsets_file.name == "unet.pt"
    unet = read_unet(parts.offsets_file, parts.state, domain.base) if has_unet else None
    picture, _ = read_image(image, domain.base.image_size)
    seen = domain.base.see(domain.params["image_encoder"], jnp.asarray(picture)[None], domain.clip_features)
    folded = fold(domain.method, Trainable(), domain.frozen, seen)[0]
    return Concept(image.stem, "full" if has_unet else "head", domain.fingerprint, Trainable(parts.factors, unet=unet), folded)


def _notes(settings: CheckpointSettings, open_clip: str) -> tuple[str, ...]:
    version, normed = open_clip.replace("-", " "), _OPEN_CLIP[open_clip][1]
    notes = [f"Read as of OpenCLIP {version}, which norms {normed}; open_clip chooses the other."]
    if not settings.holds_prompt:
        prompt, kind = shortened(settings.prompt), settings.template
        notes.append(f"Its prompt {prompt} is none of ours; the captions of kind {kind!r} take its place.")
    return tuple(notes)
