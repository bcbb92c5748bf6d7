"""The settings of a checkpoint (config.json) in terms of this library."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from e4t_jax import bases
from e4t_jax.bases import StableDiffusion
from e4t_jax.bases.image_encoders.clip import ClipImageEncoder
from e4t_jax.bases.stable_diffusion.clip import CLIPVision
from e4t_jax.checks import SCALE, WEIGHT, Between
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError, shortened
from e4t_jax.interop.e4t_diffusion.tensors import read_image_encoder
from e4t_jax.interop.model_card import WRITTEN_BY
from e4t_jax.templates import templates
from e4t_jax.words import PLACEHOLDER

# The public code's lists of prompts by name, and the kind of captions here that each is.
_TEMPLATES = {"normal": "object", "face": "face", "art": "art"}
_REG_LAMBDA = 0.01  # the default of the public code's pretraining
# (width, layers, patch) -> OpenCLIP's name of the tower, and of its weights with each activation.
_TOWERS = {
    (1280, 32, 14): ("ViT-H-14", "laion2b_s32b_b79k"),
    (1024, 24, 14): ("ViT-L-14", "laion2b_s32b_b82k"),
    (768, 12, 16): ("ViT-B-16", "laion2b_s34b_b88k"),
    (768, 12, 32): ("ViT-B-32", "laion2b_s34b_b79k"),
}
_TOLD = "clip_vision_config"  # a key of ours, which the public code does not read
_DEFAULTS = {"num_attention_heads": None, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_TOKENS = {"face": "face", "art": "art", "style": "art"}


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """What a checkpoint was pretrained with, and whether it was tuned on a picture since."""

    is_tuned: bool
    domain_token: str
    scale: Annotated[float, SCALE]
    regularisation: Annotated[float, WEIGHT]  # its reg_lambda, of the sum of ‖e*‖² over a batch
    prompt: str | None  # one prompt, or the name of a list of them
    template: str  # the kind of captions nearest to it
    holds_prompt: bool  # whether that kind holds the prompt
    image_encoder: str  # the name of the OpenCLIP tower
    base: str | None  # the model it was trained on, as its trainer named it
    moved: Annotated[float, WEIGHT]  # how far tuning has moved a weight at most, about (`_moved`)
    image_encoder_config: Mapping[str, Any]  # what of it no tensor tells, where a domain was exported from here


def read_settings(file: Path) -> CheckpointSettings:
    """The settings of pretraining, which the public code's inference reads: a tuned checkpoint's are nested in its own.

    Errors: `UserError` for a file that is missing or no JSON, and for settings that are missing, of the wrong kind or out of range.
    """
    own = bases.read_json(file)
    nested = own.get("pretrained_args")
    settings = {**own, **(nested if isinstance(nested, dict) else {})}
    token = settings.get("domain_class_token")
    if not isinstance(token, str):
        raise UserError(f"{file} lacks domain_class_token; give a checkpoint of the public code.")
    prompt = settings.get("prompt_template")
    if not isinstance(prompt, str | None):
        raise UserError(f"{file}: prompt_template = {shortened(prompt)} is no prompt; give a checkpoint of the public code.")
    template, holds_prompt = template_of(prompt, token)
    base = (nested if isinstance(nested, dict) else own).get("pretrained_model_name_or_path")
    return CheckpointSettings(
        is_tuned="pretrained_args" in own,
        domain_token=token,
        scale=_number(file, settings, "domain_embed_scale", SCALE, Domain.scale),
        regularisation=_number(file, settings, "reg_lambda", WEIGHT, _REG_LAMBDA),
        prompt=prompt,
        template=template,
        holds_prompt=holds_prompt,
        image_encoder=str(settings.get("clip_model_name_or_path")),
        base=base if isinstance(base, str) and base else None,
        moved=_moved(own),
        image_encoder_config=_image_encoder_config(file, settings),
    )


def _image_encoder_config(file: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    config = settings.get(_TOLD, {})
    if not isinstance(config, dict) or not set(config) <= set(_DEFAULTS):
        raise UserError(f"{file}: {_TOLD} = {shortened(config)} is no image encoder's; export the domain again.")
    return config


def _moved(settings: Mapping[str, Any]) -> float:
    """Steps times the rate of a tuning, about the most that AdamW moves a weight by; of its default where it does not say."""
    steps, rate = (settings.get(name, default) for name, default in (("max_train_steps", 30), ("learning_rate", 1.6e-5)))
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        moved = float(steps) * float(rate)
        return moved if moved in WEIGHT else 0.0
    return 0.0


def template_of(prompt: str | None, domain_token: str) -> tuple[str, bool]:
    """The kind of captions (`templates.TEMPLATES`) nearest to a checkpoint's prompts, and whether it holds them.

    For a single prompt, that is the kind of the domain's word, or another one that holds the prompt.
    """
    if prompt in _TEMPLATES:
        return _TEMPLATES[prompt], True
    kind = _TOKENS.get(domain_token, "object")
    if prompt is None:
        return kind, True
    spoken = prompt.replace("{placeholder_token}", PLACEHOLDER)
    holding = [name for name in (kind, "object", "face", "art", "neutral") if spoken in templates(name)]
    if holding:
        return holding[0], True
    return ("art" if "style" in spoken else kind), False


def _number(file: Path, settings: Mapping[str, Any], name: str, within: Between, default: float) -> float:
    """A number of the settings, within the bounds of what it is here."""
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in within:
        raise UserError(f"{file}: {name} = {shortened(value)} is out of range; it must be {within}.")
    return float(value)


def config_of(domain: Domain, base: StableDiffusion, told: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a domain: what the public code's tuning and inference read; `told` as `image_encoder_config`.

    Its reg_lambda weighs another sum than our λ does, so that is the public code's own default.
    """
    vision = _tower(base)
    geometry = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size)
    tower, weights = _TOWERS.get(geometry, ("ViT-{}x{}-{}".format(*geometry), "none"))
    names = {kind: name for name, kind in _TEMPLATES.items()}
    config = {
        "pretrained_model_name_or_path": domain.base_name,
        "clip_model_name_or_path": f"{tower}::{'openai' if vision.hidden_act == 'quick_gelu' else weights}",
        "domain_class_token": domain.domain_token,
        "placeholder_token": PLACEHOLDER,
        "prompt_template": names.get(domain.template, "a photo of {placeholder_token}"),
        "domain_embed_scale": domain.scale,
        "reg_lambda": _REG_LAMBDA,
        "written_by": f"{WRITTEN_BY}-domain",
    }
    return config | ({_TOLD: dict(told)} if told else {})


def _tower(base: StableDiffusion) -> CLIPVision:
    assert isinstance(base.image_encoder, ClipImageEncoder)  # the only one whose features can be exported
    return base.image_encoder.module


def image_encoder_config(base: StableDiffusion, tower: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What an import would not tell from a tower's tensors and name (`tensors.read_image_encoder`), of this base's."""
    vision = _tower(base)
    name = "openai" if vision.hidden_act == "quick_gelu" else ""
    told = {**_DEFAULTS, **read_image_encoder(tower, "encoder.pt", name)[0]}
    own = {key: getattr(vision, key) for key in _DEFAULTS}
    return {key: value for key, value in own.items() if told[key] != value}
