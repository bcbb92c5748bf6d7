"""Turns a checkpoint of the public PyTorch implementation of E4T into a domain, or into a domain and a concept.

python -m train.import_reference --reference DIR --base HUB_ID|DIR --out DOMAIN

Newer checkpoints hold less: no image encoder, which is OpenCLIP's ViT-H/14 as it was published; of a tuned one, the offsets alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from e4t_jax import bases
from e4t_jax.checks import SCALE, WEIGHT
from e4t_jax.cli.shared import Command
from e4t_jax.concept import Concept
from e4t_jax.data.images import read_image
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError, shortened
from e4t_jax.files.concept_files import concept_bytes
from e4t_jax.files.domain_files import misfit, save_domain
from e4t_jax.interop.e4t_diffusion import State, read_encoder, read_image_encoder, read_offsets, read_settings, template_of
from e4t_jax.interop.e4t_diffusion_files import check_text_encoder, one_line, read_number, read_state, read_unet
from e4t_jax.objective import Trainable, fold
from e4t_jax.storage import check_writable, temporary_folder, to_json, write_file


@dataclass(frozen=True)
class Config(Command):
    """Import weight_offsets.pt, encoder.pt and config.json of the public PyTorch implementation (needs PyTorch)."""

    reference: Path
    """Folder of the checkpoint; one with pretrained_args in its config.json is a tuned concept."""
    base: str
    """The base model it was trained on: a Hub id or a diffusers folder."""
    out: Path
    """Folder of the domain to write; CLIP's image encoder, where the checkpoint contains it, is kept in it."""
    image_encoder: str | None = None
    """CLIP's, for a checkpoint that does not contain it: Hub id or folder; OpenCLIP's ViT-H/14 where not given."""
    image: Path | None = None
    """For a tuned checkpoint: the picture it was tuned on; the concept is named after it."""
    open_clip: Literal["before-2.23", "2.23-or-later"] = "before-2.23"
    """The version of OpenCLIP that the checkpoint was trained with: from 2.23 on it norms all tokens, before the first alone."""


def main(config: Config) -> None:
    if not config.reference.is_dir():
        raise UserError(f"{config.reference} is no folder; give that of a checkpoint.", "reference")
    file = config.reference / "config.json"
    settings = bases.read_json(file)
    tuned = "pretrained_args" in settings
    settings = read_settings(settings)
    if tuned and config.image is None:
        raise UserError(f"{config.reference} is a tuned concept; give the picture it was tuned on.", "image")
    if not tuned and config.image is not None:
        raise UserError(f"{config.reference} is no tuned concept; leave it out.", "image")
    token = settings.get("domain_class_token")
    if not isinstance(token, str):
        raise UserError(f"{file} lacks domain_class_token; give a checkpoint of the public code.")
    scale, regularisation = (
        read_number(file, settings, name, within, default)
        for name, within, default in (
            ("domain_embed_scale", SCALE, Domain.scale),
            ("reg_lambda", WEIGHT, Domain.regularisation),
        )
    )
    prompt = settings.get("prompt_template")
    if not isinstance(prompt, str | None):
        raise UserError(f"{file}: prompt_template = {shortened(prompt)} is no prompt; give a checkpoint of the public code.")
    template, is_held = template_of(prompt, token)
    check_writable(config.out)
    encoder_file = config.reference / "encoder.pt"
    encoder_state = read_state(encoder_file)
    with one_line(encoder_file):
        encoder = read_encoder(encoder_state, encoder_file.name)
        eyes = image_encoder_files(config, encoder_state, settings)
    whole = config.reference / "unet.pt"
    offsets_file = whole if tuned and whole.exists() else config.reference / "weight_offsets.pt"
    state = read_state(offsets_file)
    with one_line(offsets_file):
        factors = read_offsets(state, offsets_file.name)
    with temporary_folder(config.out / "image_encoder") as folder:
        for name, content in eyes.items():
            write_file(folder / name, content)
        base, params = bases.load_base(config.base, str(folder) if eyes else config.image_encoder)
    check_text_encoder(config.reference, params["text_encoder"], config.base)
    clip_features = "bicubic-tokens" if config.open_clip == "before-2.23" else "bicubic-normed-tokens"
    domain = Domain(
        config.base,
        token,
        base,
        params,
        encoder,
        factors,
        scale=scale,
        regularisation=regularisation,
        template=template,
        image_encoder="image_encoder" if eyes else config.image_encoder,
        clip_features=clip_features,
    )
    check_fits(config, domain)
    beside: dict[str, bytes | str] = {f"image_encoder/{name}": content for name, content in eyes.items()}
    if tuned and config.image:
        domain = dataclasses.replace(domain, factors={})  # all of them are the concept's
        unet = read_unet(offsets_file, state, base) if offsets_file == whole else None
        concept = tuned_concept(config.image, domain, Trainable(factors, unet=unet))
        beside[f"{concept.name}.safetensors"] = concept_bytes(concept, np.float32)
    save_domain(config.out, domain, np.float32, beside=beside)  # numbers made elsewhere are kept as they are
    print(f"Wrote the domain {config.out}" + (f" and the concept {config.image.stem} in it" if tuned and config.image else ""))
    normed = "the first token" if config.open_clip == "before-2.23" else "all tokens"
    print(f"Read as of OpenCLIP {config.open_clip.replace('-', ' ')}, which norms {normed}; --open-clip says otherwise.")
    if not is_held:
        print(f"Its prompt {shortened(prompt)} is none of ours; the captions of kind {template!r} take its place.")


def image_encoder_files(config: Config, state: State, settings: dict[str, Any]) -> dict[str, bytes | str]:
    """The files of CLIP's image encoder that a checkpoint contains; none for a newer one, which is saved without.

    Errors: `UserError` where it contains one, and one is given.
    """
    if not any(name.startswith("clip_vision.") for name in state):
        return {}
    if config.image_encoder is not None:
        raise UserError(f"{config.reference / 'encoder.pt'} contains one; leave it out.", "image_encoder")
    facts, tensors = read_image_encoder(state, "encoder.pt", str(settings.get("clip_model_name_or_path")))
    return {"model.safetensors": save(tensors, {"format": "pt"}), "config.json": to_json(facts)}


def check_fits(config: Config, domain: Domain) -> None:
    """Errors: `UserError` for a checkpoint of another base or image encoder, or one that lacks offsets of some layers."""
    part = misfit(domain, domain.base.feature_width)
    kernels = domain.base.offset_kernels(domain.params["unet"])
    if part or set(domain.factors) != set(kernels):
        raise UserError(f"the {part or 'offsets'} of {config.reference} do not fit it; give the base it was trained on.", "base")


def tuned_concept(image: Path, domain: Domain, trainable: Trainable) -> Concept:
    """The concept of a tuned checkpoint: its offsets, its U-Net where it has its own, and the picture as the encoder sees it."""
    picture, _ = read_image(image, domain.base.image_size)
    seen = domain.base.see(domain.params["image_encoder"], jnp.asarray(picture)[None], domain.clip_features)
    folded = fold(domain.method, Trainable(), domain.frozen, seen)[0]
    scope = "head" if trainable.unet is None else "full"
    return Concept(image.stem, scope, domain.fingerprint, trainable, folded)
