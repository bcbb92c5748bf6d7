"""Turns a checkpoint of the public PyTorch implementation of E4T into a domain, or into a domain and a concept.

python -m train.import_reference --reference DIR --base HUB_ID|DIR --out DOMAIN
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from e4t_jax.interop.mkshing import read_encoder, read_image_encoder, read_offsets
from e4t_jax.objective import Trainable, make_method
from e4t_jax.storage import check_writable, write_file

_TEMPLATES = {"face": "face", "art": "art", "style": "art"}


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


def main(config: Config) -> None:
    settings = bases.read_json(config.reference / "config.json")
    tuned = "pretrained_args" in settings
    settings = {**settings.get("pretrained_args", {}), **settings}
    if tuned and config.image is None:
        raise UserError(f"{config.reference} is a tuned concept; give the picture it was tuned on as --image.")
    missing = [name for name in ("domain_class_token", "clip_model_name_or_path") if name not in settings]
    if missing:
        raise UserError(f"{config.reference / 'config.json'} lacks {missing[0]}; give a checkpoint of the public implementation.")
    check_writable(config.out)
    encoder_state = read_state(config.reference / "encoder.pt")
    # The weights that OpenAI trained have an activation of their own.
    activation = "quick_gelu" if "openai" in settings["clip_model_name_or_path"] else "gelu"
    facts, tensors = read_image_encoder(encoder_state, "encoder.pt", activation)
    write_file(config.out / "image_encoder" / "model.safetensors", save(tensors, {"format": "pt"}))
    bases.write_json(config.out / "image_encoder" / "config.json", facts)

    base, params = bases.load_base(config.base, str(config.out / "image_encoder"))
    token = settings["domain_class_token"]
    domain = Domain(
        config.base,
        token,
        base,
        params,
        read_encoder(encoder_state, "encoder.pt"),
        {},
        scale=settings.get("domain_embed_scale", 0.1),
        template=_TEMPLATES.get(token, "object"),
        image_encoder="image_encoder",
        clip_features="tokens",
    )
    make_method(base, token)  # says what is wrong with the token before anything is written
    state = read_state(config.reference / ("unet.pt" if tuned else "weight_offsets.pt"))
    factors = read_offsets(state, "unet.pt" if tuned else "weight_offsets.pt")
    if not tuned:
        domain = replace(domain, factors=factors)
    save_domain(config.out, domain, np.float32)  # numbers made elsewhere are kept as they are
    print(f"Wrote the domain {config.out}")
    if tuned and config.image:
        concept = tuned_concept(config, domain, state, factors)
        save_concept(config.out / f"{concept.name}.safetensors", concept, np.float32)
        print(f"Wrote the concept {config.out / concept.name}.safetensors")


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
    folded = domain.method.encoder.apply({"params": domain.encoder}, seen, method="fold")[0]
    return Concept(config.image.stem, "full", domain.fingerprint, Trainable(factors, unet=unet), folded)
