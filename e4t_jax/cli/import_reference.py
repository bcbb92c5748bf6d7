"""Turns a checkpoint of the public PyTorch implementation of E4T into a domain, or into a domain and a concept.

python -m train.import_reference --reference DIR --base HUB_ID|DIR --out DOMAIN

Newer checkpoints hold less: no image encoder, which is OpenCLIP's ViT-H/14 as it was published; of a tuned one, the offsets alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from e4t_jax import bases
from e4t_jax.bases import Params
from e4t_jax.cli.shared import Command
from e4t_jax.concept import Concept, concept_bytes
from e4t_jax.data.images import read_image
from e4t_jax.domain import Domain
from e4t_jax.domain_files import misfit, save_domain
from e4t_jax.errors import UserError
from e4t_jax.interop.mkshing import differs, read_encoder, read_image_encoder, read_offsets, read_settings, template_of
from e4t_jax.objective import Trainable, fold
from e4t_jax.ranges import RANGES
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
    settings = bases.read_json(config.reference / "config.json")
    tuned = "pretrained_args" in settings
    settings = read_settings(settings)
    if tuned and config.image is None:
        raise UserError(f"{config.reference} is a tuned concept; give the picture it was tuned on.", "image")
    token = settings.get("domain_class_token")
    if not isinstance(token, str):
        raise UserError(f"{config.reference / 'config.json'} lacks domain_class_token; give a checkpoint of the public code.")
    scale, regularisation = (
        read_number(config, settings, name, ours, default)
        for name, ours, default in (("domain_embed_scale", "scale", 0.1), ("reg_lambda", "regularisation", 0.01))
    )
    template, is_held = template_of(settings.get("prompt_template"), token)
    check_writable(config.out)
    encoder_state = read_state(config.reference / "encoder.pt")
    encoder = read_encoder(encoder_state, "encoder.pt")
    whole = config.reference / "unet.pt"
    offsets_file = whole if tuned and whole.exists() else config.reference / "weight_offsets.pt"
    state = read_state(offsets_file)
    factors = read_offsets(state, offsets_file.name)
    eyes = image_encoder_files(config, encoder_state, settings)
    with temporary_folder(config.out / "image_encoder") as folder:
        for name, content in eyes.items():
            write_file(folder / name, content)
        base, params = bases.load_base(config.base, str(folder) if eyes else config.image_encoder)
    check_text_encoder(config, params)
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
        unet = read_unet(offsets_file, state, domain) if offsets_file == whole else None
        concept = tuned_concept(config.image, domain, Trainable(factors, unet=unet))
        beside[f"{concept.name}.safetensors"] = concept_bytes(concept, np.float32)
    save_domain(config.out, domain, np.float32, beside=beside)  # numbers made elsewhere are kept as they are
    print(f"Wrote the domain {config.out}" + (f" and the concept {config.image.stem} in it" if tuned and config.image else ""))
    normed = "the first token" if config.open_clip == "before-2.23" else "all tokens"
    print(f"Read as of OpenCLIP {config.open_clip.replace('-', ' ')}, which norms {normed}; --open-clip says otherwise.")
    if not is_held:
        print(f"Its prompt {settings['prompt_template']!r} is none of ours; the captions of kind {template!r} take its place.")


def image_encoder_files(config: Config, state: dict[str, np.ndarray], settings: dict[str, Any]) -> dict[str, bytes | str]:
    """The files of CLIP's image encoder that a checkpoint contains; none for a newer one, which is saved without.

    Errors: `UserError` where it contains one, and one is given.
    """
    if not any(name.startswith("clip_vision.") for name in state):
        return {}
    if config.image_encoder is not None:
        raise UserError(f"{config.reference / 'encoder.pt'} contains one; leave it out.", "image_encoder")
    facts, tensors = read_image_encoder(state, "encoder.pt", str(settings.get("clip_model_name_or_path")))
    return {"model.safetensors": save(tensors, {"format": "pt"}), "config.json": to_json(facts)}


def read_number(config: Config, settings: dict[str, Any], name: str, ours: str, default: float) -> float:
    """A number of the checkpoint's settings.

    Errors: `UserError` where it is none, or out of range of what it is here.
    """
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in RANGES[ours]:
        raise UserError(f"{config.reference / 'config.json'}: {name} = {value!r} is out of range; it must be {RANGES[ours]}.")
    return float(value)


def check_text_encoder(config: Config, params: dict[str, Any]) -> None:
    """A domain reads its prompts with the base's text encoder: one that was trained on has to be part of the base.

    Errors: `UserError` where a text encoder lies beside the checkpoint that is not the base's.
    """
    path = config.reference / "text_encoder.pt"
    if not path.exists():
        return
    name = differs(read_state(path), params["text_encoder"])
    if name:
        raise UserError(
            f"{path} is another text encoder than that of {config.base} ({name} differs); "
            "put it into text_encoder of a copy of the base, and give that.",
            "base",
        )


def check_fits(config: Config, domain: Domain) -> None:
    """Errors: `UserError` for a checkpoint of another base or image encoder, or one that lacks offsets of some layers."""
    part = misfit(domain, domain.base.feature_width)
    kernels = domain.base.offset_kernels(domain.params["unet"])
    if part or set(domain.factors) != set(kernels):
        raise UserError(f"the {part or 'offsets'} of {config.reference} do not fit it; give the base it was trained on.", "base")


def read_state(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a .pt file, float32.

    Errors: `UserError` for a number that is not finite, and as `bases.load_pickled`.
    """
    state = {name: np.asarray(tensor.float().numpy()) for name, tensor in bases.load_pickled(path).items()}
    for name, tensor in state.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite; copy it again.")
    return state


def read_unet(path: Path, state: dict[str, np.ndarray], domain: Domain) -> Params:
    """All weights of a tuned U-Net, in our names."""
    weights = bases.Weights(path, {name: partial(state.__getitem__, name) for name in state})
    return bases.fill_part(weights, "unet", domain.base.param_shapes()["unet"])


def tuned_concept(image: Path, domain: Domain, trainable: Trainable) -> Concept:
    """The concept of a tuned checkpoint: its offsets, its U-Net where it has its own, and the picture as the encoder sees it."""
    picture, _ = read_image(image, domain.base.image_size)
    seen = domain.base.see(domain.params["image_encoder"], jnp.asarray(picture)[None], domain.clip_features)
    folded = fold(domain.method, Trainable(), domain.frozen, seen)[0]
    scope = "head" if trainable.unet is None else "full"
    return Concept(image.stem, scope, domain.fingerprint, trainable, folded)
