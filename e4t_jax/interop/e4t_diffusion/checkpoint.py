"""A whole checkpoint as a domain, or as a domain and a concept.

Newer checkpoints hold less: no image encoder, which is OpenCLIP's ViT-H/14 as it was published; of a tuned one, the offsets alone.
One tensor at a time goes from file to file; what is held whole is the encoder that learns, 1 GB at Stable Diffusion's size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from e4t_jax import bases
from e4t_jax.bases import LoadedBase, Params
from e4t_jax.bases.hub import hub_id_of
from e4t_jax.bases.image_encoders.clip import ClipImageEncoder
from e4t_jax.concept import Concept
from e4t_jax.data.images import read_whole
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError, shortened
from e4t_jax.files.concept_files import concept_bytes
from e4t_jax.files.domain_files import load_domain, misfit, save_domain
from e4t_jax.files.places import local_name, local_path
from e4t_jax.interop.e4t_diffusion.files import CheckpointFile, check_text_encoder, read_unet, tensor_errors_as_one_line
from e4t_jax.interop.e4t_diffusion.locate import PICTURE, Located, check_pytorch, locate
from e4t_jax.interop.e4t_diffusion.own_numbers import FILE, read_own_numbers
from e4t_jax.interop.e4t_diffusion.tensors import TOWER, State, factors_of, read_encoder, read_image_encoder, read_networks
from e4t_jax.interop.e4t_diffusion.trained_on import difference_by_name, difference_by_weights
from e4t_jax.objective import Trainable, fold
from e4t_jax.offsets import Factors, Networks
from e4t_jax.storage import check_writable, temporary_folder, to_json, write_file
from e4t_jax.tuning.public_recipe import REGULARISATION

# Version of OpenCLIP -> (what the encoder sees of CLIP, in words: which tokens the last layer's norm is applied to).
_OPEN_CLIP = {"before-2.23": ("bicubic-tokens", "the first token"), "2.23-or-later": ("bicubic-normed-tokens", "all tokens")}
_IMAGE_ENCODER = "image_encoder"  # the folder in that of the domain


@dataclasses.dataclass(frozen=True)
class ImportedCheckpoint:
    """What was written to `folder`: a domain and, of a tuned checkpoint, the concept in it; `notes` say what was assumed."""

    folder: Path
    concept: Concept | None
    notes: tuple[str, ...]

    @cached_property
    def domain(self) -> Domain:
        """The domain, read from its files when it is first asked for."""
        return load_domain(self.folder)


class _Parts(NamedTuple):
    """What is read of a checkpoint; its image encoder lies in a file."""

    encoder: Params
    networks: Networks | None  # None where they say the factors only nearly
    factors: Factors
    offsets_file: Path
    state: State  # of that file
    settings: Mapping[str, Any] | None  # of a domain that was exported from here: fields of `Domain`


def import_checkpoint(
    reference: str | Path,
    base: str | None,
    out: str | Path,
    *,
    revision: str | None = None,
    image_encoder: str | None = None,
    image: str | Path | None = None,
    open_clip: str = "before-2.23",
) -> ImportedCheckpoint:
    """Writes the domain of a checkpoint of the public PyTorch implementation, and of a tuned one the concept: all, or nothing.

    Args:
        reference: Hub id or folder of weight_offsets.pt (or unet.pt), encoder.pt and config.json; reading them needs PyTorch.
        base: The base model it was trained on, as `load_base` takes it; where None, the one that config.json names.
        out: Folder of the domain.
        revision: Of a Hub id: the branch, tag or commit to take.
        image_encoder: CLIP's, as `load_base` takes it, for a checkpoint that does not contain it.
        image: For a tuned checkpoint, the picture it was tuned on; the concept is named after it. Where not given, domain.png
            beside the checkpoint, and the concept has the folder's name.
        open_clip: The version of OpenCLIP it was trained with, "before-2.23" or "2.23-or-later": from 2.23 on it norms all tokens,
            before the first alone. Nothing in a checkpoint tells; the public one for faces is older than 2.23.

    Errors: `UserError` for files that are missing, damaged or of another base, and for a folder that cannot be written.
    """
    out, reference = local_path(out, "out"), local_name(str(reference), "reference")
    base = None if base is None else local_name(base, "base")
    image_encoder = None if image_encoder is None else local_name(image_encoder, "image_encoder")
    if open_clip not in _OPEN_CLIP:
        raise UserError(f"{open_clip!r} is unknown; choose one of {', '.join(_OPEN_CLIP)}.", "open_clip")
    check_pytorch()
    check_writable(out)
    found = locate(reference, base, revision)
    picture = _picture(found, image)
    check_writable(out, needed=(found.folder / "encoder.pt").stat().st_size if (found.folder / "encoder.pt").exists() else 0)
    with temporary_folder(out / _IMAGE_ENCODER) as made:
        own = _write_image_encoder(found, made, image_encoder)
        parts = _read_parts(found)
        loaded = bases.survey_base(found.base, str(made) if own else image_encoder)
        domain = _assemble(found, parts, loaded, image_encoder=_IMAGE_ENCODER if own else image_encoder, open_clip=open_clip)
        _check_fits(found, domain)
        beside: dict[str, bytes | str | Path] = {f"{_IMAGE_ENCODER}/{file.name}": file for file in made.iterdir()} if own else {}
        concept = None
        if picture is not None:
            domain = dataclasses.replace(domain, factors={}, networks=None)  # all of them are the concept's
            seeing = made if own else _image_encoder_folder(found.base, image_encoder)
            concept = _concept(picture, domain, parts, seeing)
            beside[f"{concept.name}.safetensors"] = concept_bytes(concept, np.float32)
        # Numbers made elsewhere are kept as they are.
        save_domain(out, domain, np.float32, beside=beside, origin=_origin(reference, found, open_clip))
    return ImportedCheckpoint(out, concept, _notes(found, parts, open_clip))


class _Picture(NamedTuple):
    """The picture of a tuned checkpoint, and what its concept is called."""

    file: Path
    name: str


def _picture(found: Located, image: str | Path | None) -> _Picture | None:
    """The picture that a tuned checkpoint was tuned on: the one given, or the one beside it; None of one that was not tuned."""
    if not found.settings.is_tuned:
        if image is not None:
            raise UserError(f"{found.folder} is no tuned concept; leave it out.", "image")
        return None
    if image is not None:
        image = local_path(image, "image")
        return _Picture(image, image.stem)
    beside = found.folder / PICTURE
    if not beside.exists():
        raise UserError(f"{found.folder} is a tuned concept without {PICTURE}; give the picture it was tuned on.", "image")
    hub_id = hub_id_of(found.folder)
    return _Picture(beside, hub_id.rpartition("/")[2] if hub_id else found.folder.resolve().name)


def _write_image_encoder(found: Located, folder: Path, image_encoder: str | None) -> bool:
    """Writes CLIP's image encoder into `folder`, where the checkpoint contains it; whether it does. Newer ones are saved without.

    Errors: `UserError` where it contains one, and one is given.
    """
    file = found.folder / "encoder.pt"
    state = CheckpointFile(file)
    if not any(name.startswith(TOWER) for name in state):
        return False
    if image_encoder is not None:
        raise UserError(f"{file} contains one; leave it out.", "image_encoder")
    with tensor_errors_as_one_line(file):
        config, tensors = read_image_encoder(state, file.name, found.settings.image_encoder)
        config |= found.settings.image_encoder_config
    # Views of the mapped file: no more than pages of it are in memory.
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_file(folder / "config.json", to_json(config))
    return True


def _read_parts(found: Located) -> _Parts:
    file = found.folder / "encoder.pt"
    with tensor_errors_as_one_line(file):
        encoder = read_encoder(CheckpointFile(file), file.name)
    unet_file = found.folder / "unet.pt"
    file = unet_file if found.settings.is_tuned and unet_file.exists() else found.folder / "weight_offsets.pt"
    state = CheckpointFile(file)
    with tensor_errors_as_one_line(file):
        networks = read_networks(state, file.name)
        factors = factors_of(networks)
    own = None if found.settings.is_tuned else read_own_numbers(file)
    if own is None and not found.settings.is_tuned and any(re.search(r"\.to_[qkv]\.weight$", name) for name in state):
        raise UserError(f"{file} holds kernels that belong to its offsets; give it with the {FILE} it was exported with.")
    if own is None:
        return _Parts(encoder, networks, factors, file, state, settings=None)
    return _Parts(encoder, networks if own.has_networks else None, own.factors, file, state, settings=own.settings)


def _assemble(found: Located, parts: _Parts, loaded: LoadedBase, *, image_encoder: str | None, open_clip: str) -> Domain:
    """The domain on its base, with shapes in place of the base's weights."""
    settings, base = found.settings, loaded.base
    assert isinstance(base, bases.StableDiffusion)
    own = dict(parts.settings or {})
    base = base.with_features(own.pop("features", _OPEN_CLIP[open_clip][0]))
    assert isinstance(base.image_encoder, ClipImageEncoder)  # no other has those features
    networks = parts.networks
    domain = Domain(
        found.base,
        settings.domain_token,
        base,
        loaded.params,
        encoder=parts.encoder,
        factors=parts.factors,
        scale=settings.scale,
        template=settings.template,
        image_encoder=image_encoder,
        clip_squash=base.image_encoder.image_size,
        samples=loaded.samples,
        networks=None if networks is None else lambda: networks,
    )
    return dataclasses.replace(domain, **own)


def _check_fits(found: Located, domain: Domain) -> None:
    """Errors: `UserError` for a checkpoint of another base or image encoder, or one that lacks offsets of some layers."""
    if (found.folder / "text_encoder.pt").exists():
        text_encoder = bases.load_part(
            bases.base_folder(found.base) / "text_encoder", "text_encoder", domain.params["text_encoder"]
        )
        check_text_encoder(found.folder, text_encoder, found.base)
    part = misfit(domain, domain.base.feature_width)
    kernels = domain.base.offset_kernels(domain.params["unet"])
    if part or set(domain.factors) != set(kernels):
        named = f" ({found.settings.base})" if found.settings.base else ""
        raise UserError(
            f"the {part or 'offsets'} of {found.folder} do not fit {found.base}; give the base it was trained on{named}.", "base"
        )


def _image_encoder_folder(base: str, image_encoder: str | None) -> Path:
    """The folder of the image encoder of a checkpoint that has none: the one given, the base's own, or the paper's."""
    own = bases.base_folder(base) / "image_encoder"
    return own if image_encoder is None and (own / "config.json").exists() else bases.image_encoder_folder(image_encoder)


def _concept(picture: _Picture, domain: Domain, parts: _Parts, image_encoder: Path) -> Concept:
    """The concept of a tuned checkpoint: its offsets, its U-Net where it has its own, and the picture as the encoder sees it."""
    has_unet = parts.offsets_file.name == "unet.pt"
    unet = read_unet(parts.offsets_file, parts.state, domain.base) if has_unet else None
    weights = bases.load_part(image_encoder, "image_encoder", domain.params["image_encoder"])
    whole = read_whole(picture.file, domain.clip_squash or domain.base.image_size)
    seen = domain.base.image_encoder.see(weights, jnp.asarray(whole)[None])
    folded = fold(domain.method, Trainable(), domain.frozen, seen)[0]
    scope = "full" if has_unet else "head"
    return Concept(picture.name, scope, domain.fingerprint, Trainable(parts.factors, unet=unet), folded)


def _origin(reference: str | Path, found: Located, open_clip: str) -> dict[str, str]:
    """What domain.json says of where the domain is from."""
    hub_id = hub_id_of(found.folder)
    origin = {"checkpoint": str(reference) if hub_id else str(found.folder.absolute()), "open_clip": open_clip}
    origin |= {"revision": found.folder.name} if hub_id else {}
    return origin | ({"trained_on": found.settings.base} if found.settings.base else {})


def _notes(found: Located, parts: _Parts, open_clip: str) -> tuple[str, ...]:
    settings, version, normed = found.settings, open_clip.replace("-", " "), _OPEN_CLIP[open_clip][1]
    notes = [f"Read as of OpenCLIP {version}, which norms {normed}; open_clip chooses the other."]
    if parts.settings is not None:
        notes = [f"Read with the numbers and settings that it was exported with ({FILE})."]
    has_unet = parts.offsets_file.name == "unet.pt"
    difference = difference_by_weights(settings, parts.state, found.base) if has_unet else difference_by_name(settings, found.base)
    if difference:
        notes.append(difference)
    if parts.settings is not None:
        return tuple(notes)
    notes.append(
        f"Its reg_lambda {settings.regularisation:g} weighs the sum of ‖e*‖² over a batch, so it is not our λ: tuning takes "
        f"{Domain.regularisation:g} of ‖s E‖² / ‖e_d‖², and recipe public {REGULARISATION:g} of that sum."
    )
    if not settings.holds_prompt:
        prompt, kind = shortened(settings.prompt), settings.template
        notes.append(f"Its prompt {prompt} is none of ours; the captions of kind {kind!r} take its place.")
    return tuple(notes)
