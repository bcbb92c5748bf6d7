"""Turns a checkpoint of the public PyTorch implementation of E4T into a domain, or into a domain and a concept.

python -m train.import_reference --reference DIR --base HUB_ID|DIR --out DOMAIN
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from e4t_jax import bases
from e4t_jax.cli.shared import Command
from e4t_jax.concept import Concept, save_concept
from e4t_jax.data.images import read_image
from e4t_jax.domain import Domain
from e4t_jax.domain_files import save_domain
from e4t_jax.errors import UserError
from e4t_jax.interop.mkshing import differs, read_encoder, read_image_encoder, read_offsets, read_settings, template_of
from e4t_jax.objective import Trainable, fold, make_method
from e4t_jax.ranges import RANGES
from e4t_jax.storage import check_writable, move_files, temporary_folder, write_file


@dataclass(frozen=True)
class Config(Command):
    """Import weight_offsets.pt, encoder.pt and config.json of the public PyTorch implementation (needs PyTorch)."""

    reference: Path
    """Folder of the checkpoint; one with unet.pt is a tuned concept."""
    base: str
    """The base model it was trained on: a Hub id or a diffusers folder."""
    out: Path
    """Folder of the domain to write; CLIP's image encoder, which the checkpoint contains, is kept in it."""
    image: Path | None = None
    """For a tuned checkpoint: the picture it was tuned on; the concept is named after it."""
    open_clip: Literal["before-2.23", "2.23-or-later"] = "before-2.23"
    """The version of OpenCLIP that the checkpoint was trained with: from 2.23 on it norms all tokens, before the first alone."""


def main(config: Config) -> None:
    settings = bases.read_json(config.reference / "config.json")
    tuned = "pretrained_args" in settings
    settings = read_settings(settings)
    if tuned and config.image is None:
        raise UserError(f"{config.reference} is a tuned concept; give the picture it was tuned on.", "image")
    missing = [name for name in ("domain_class_token", "clip_model_name_or_path") if not isinstance(settings.get(name), str)]
    if missing:
        raise UserError(f"{config.reference / 'config.json'} lacks {missing[0]}; give a checkpoint of the public implementation.")
    scale, regularisation = (
        read_number(config, settings, name, ours, default)
        for name, ours, default in (("domain_embed_scale", "scale", 0.1), ("reg_lambda", "regularisation", 0.01))
    )
    token = settings["domain_class_token"]
    template, is_held = template_of(settings.get("prompt_template"), token)
    check_writable(config.out)
    encoder_state = read_state(config.reference / "encoder.pt")
    # The weights that OpenAI trained have an activation of their own.
    activation = "quick_gelu" if "openai" in settings["clip_model_name_or_path"] else "gelu"
    facts, tensors = read_image_encoder(encoder_state, "encoder.pt", activation)
    encoder = read_encoder(encoder_state, "encoder.pt")
    offsets_file = config.reference / ("unet.pt" if tuned else "weight_offsets.pt")
    state = read_state(offsets_file)
    factors = read_offsets(state, offsets_file.name)
    with temporary_folder(config.out / "image_encoder") as folder:
        write_file(folder / "model.safetensors", save(tensors, {"format": "pt"}))
        bases.write_json(folder / "config.json", facts)
        base, params = bases.load_base(config.base, str(folder))
        check_text_encoder(config, params)
        make_method(base, token)  # says what is wrong with the token before anything is written
        move_files(folder, config.out / "image_encoder")
    domain = Domain(
        config.base,
        token,
        base,
        params,
        encoder,
        {} if tuned else factors,
        scale=scale,
        regularisation=regularisation,
        template=template,
        image_encoder="image_encoder",
        clip_features="bicubic-tokens" if config.open_clip == "before-2.23" else "bicubic-normed-tokens",
    )
    save_domain(config.out, domain, np.float32)  # numbers made elsewhere are kept as they are
    print(f"Wrote the domain {config.out}")
    normed = "the first token" if config.open_clip == "before-2.23" else "all tokens"
    print(f"Read as of OpenCLIP {config.open_clip.replace('-', ' ')}, which norms {normed}; --open-clip says otherwise.")
    if not is_held:
        print(f"Its prompt {settings['prompt_template']!r} is none of ours; the captions of kind {template!r} take its place.")
    if tuned and config.image:
        concept = tuned_concept(config, domain, state, factors)
        save_concept(config.out / f"{concept.name}.safetensors", concept, np.float32)
        print(f"Wrote the concept {config.out / concept.name}.safetensors")


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


def read_state(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a .pt file, float32."""
    return {name: np.asarray(tensor.float().numpy()) for name, tensor in bases.load_pickled(path).items()}


def tuned_concept(config: Config, domain: Domain, state: dict[str, np.ndarray], factors: dict[str, Any]) -> Concept:
    """The concept of a tuned checkpoint: all weights of its U-Net, its offsets, and the picture as the encoder sees it."""
    assert config.image is not None
    weights = bases.Weights(config.reference / "unet.pt", {name: partial(state.__getitem__, name) for name in state})
    unet = bases.fill_part(weights, "unet", domain.base.param_shapes()["unet"])
    picture, _ = read_image(config.image, domain.base.image_size)
    seen = domain.base.see(domain.params["image_encoder"], jnp.asarray(picture)[None], domain.clip_features)
    folded = fold(domain.method, Trainable(), domain.frozen, seen)[0]
    return Concept(config.image.stem, "full", domain.fingerprint, Trainable(factors, unet=unet), folded)
