"""A base model by name: what ships with the package, a folder, a Hub id, or random weights of a true geometry.

Another architecture is a folder beside `stable_diffusion` and a line in `registry`: a function

    (folder, image_encoder=None, clip_features=None, **policy) -> LoadedBase, or (base, weights)

whose `image_encoder` is a folder, what finds one, or "random:…", as in `stable_diffusion.folder.open_folder`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from e4t_jax import registry
from e4t_jax.bases.formats import read_json
from e4t_jax.bases.hub import IMAGE_ENCODER, find_folder
from e4t_jax.bases.protocol import Base, LoadedBase, Params
from e4t_jax.bases.stable_diffusion.base import StableDiffusion
from e4t_jax.bases.stable_diffusion.folder import open_folder, survey_folder
from e4t_jax.bases.stable_diffusion.geometries import TEXT_LENGTH, VOCABULARY, geometry
from e4t_jax.bases.stable_diffusion.random_weights import RANDOM
from e4t_jax.bases.tokenizers import tokenizer_of_words
from e4t_jax.errors import UserError
from e4t_jax.machine import check_holds
from e4t_jax.templates import known_words

_RANDOM_IMAGE_ENCODER = f"{RANDOM}vit-h14"
_PAPERS_IMAGE_ENCODER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def load_base(
    name: str, image_encoder: str | None = None, *, clip_features: str | None = None, **policy: Any
) -> tuple[Base, Params]:
    """A base model by name: its static side and its weights, keyed "vae", "unet", "text_encoder", "image_encoder".

    Args:
        name: "creatures", a folder in the diffusers layout, a Hub id, "random:sd15" or "random:sd21".
        image_encoder: The image encoder for bases that bring none: a folder or Hub id in transformers' format,
            "random:vit-l14" or "random:vit-h14"; the paper's CLIP ViT-H/14 where not given.
        clip_features: Which of its states the concept encoder sees (CLIP's: `image_encoders.clip`); its default where not given.
        policy: How the networks compute, and what their kernels lie in, where not in float32: `dtype="bfloat16"`,
            `remat="blocks"`, `attention="xla"`.

    Errors: `UserError` for a name that leads nowhere, and for files that are missing, damaged or of another architecture.
    """
    return open_base(name, image_encoder, clip_features=clip_features, **policy)[:2]


def open_base(name: str, image_encoder: str | None = None, *, clip_features: str | None = None, **policy: Any) -> LoadedBase:
    """`load_base` with what tells the base's weights from others, however they were cast."""
    if name.startswith(RANDOM):
        return LoadedBase(*random_base(name, image_encoder, clip_features=clip_features, **policy))
    folder = base_folder(name)
    found = _image_encoder_of(folder, image_encoder)
    return LoadedBase(*_reader_of(folder)(folder, image_encoder=found, clip_features=clip_features, **policy))


def survey_base(name: str, image_encoder: str | None = None) -> LoadedBase:
    """`open_base` with shapes in place of weights: each tensor is read, and what fingerprints read of it is kept.

    Errors: `UserError` as `load_base`, and for a base of another architecture than Stable Diffusion's.
    """
    if name.startswith(RANDOM):
        raise UserError(f"{name} has random weights; give a folder or a Hub id.", "base")
    folder = base_folder(name)
    if _reader_of(folder) is not open_folder:
        raise UserError(f"{name} is no Stable Diffusion 1 or 2; give one.", "base")
    return survey_folder(folder, _image_encoder_of(folder, image_encoder))


def base_folder(name: str) -> Path:
    """The folder of a base that ships with the package, is a folder, or lies on the Hub: then it is fetched.

    Errors: `UserError` for a name that leads nowhere.
    """
    shipped = registry.find("base", name)
    return shipped() if shipped else find_folder(name, "base")


def image_encoder_folder(name: str | None = None) -> Path:
    """The folder of an image encoder, by folder or Hub id; the paper's where not given.

    Errors: `UserError` for a name that leads nowhere.
    """
    return find_folder(name or _PAPERS_IMAGE_ENCODER, "image_encoder", IMAGE_ENCODER)


def _image_encoder_of(folder: Path, name: str | None) -> str | Callable[[], Path] | None:
    """What finds the image encoder of the base in a folder, or the name of a random one; None where it has its own, and no other
    is asked for.

    It is asked when the base was found to be whole: a folder that is none makes no connection.
    """
    if name is not None and name.startswith(RANDOM):
        return name
    if name is None and (folder / "image_encoder" / "config.json").exists():
        return None
    return partial(image_encoder_folder, name)


def local_folder(name: str) -> Path | None:
    """The folder of a base that ships with the package, or is given as a folder; None for all others."""
    shipped = registry.find("base", name)
    folder = shipped() if shipped else Path(name)
    return folder if folder.is_dir() else None


def random_base(
    name: str, image_encoder: str | None = None, *, clip_features: str | None = None, **policy: Any
) -> tuple[Base, Params]:
    """Random weights of the true geometry "random:sd15" or "random:sd21", and a tokenizer of the words of our prompts.

    Errors: `UserError` for another name.
    """
    base = _geometry(name, image_encoder, clip_features).with_policy(**policy)
    check_holds(base.param_shapes(), jax.local_devices()[:1], f"the weights of {name}")
    return base, base.random_params(jax.random.key(0))


def load_base_shapes(
    name: str, image_encoder: str | None = None, *, clip_features: str | None = None, **policy: Any
) -> tuple[Base, Params]:
    """`load_base` with shapes in place of weights: of a random base none is drawn."""
    if not name.startswith(RANDOM):
        base, params = load_base(name, image_encoder, clip_features=clip_features, **policy)
        return base, jax.eval_shape(lambda: params)
    base = _geometry(name, image_encoder, clip_features).with_policy(**policy)
    return base, base.param_shapes()


def _geometry(name: str, image_encoder: str | None, clip_features: str | None) -> StableDiffusion:
    eyes = image_encoder or _RANDOM_IMAGE_ENCODER
    if not eyes.startswith(RANDOM):
        raise UserError(f"{eyes} does not go with the base {name}; choose random:vit-l14 or random:vit-h14.", "image_encoder")
    parts = (part.removeprefix(RANDOM) for part in (name, eyes))
    tokenizer = tokenizer_of_words(known_words(), TEXT_LENGTH, VOCABULARY)
    return StableDiffusion(geometry(*parts), tokenizer, clip_features=clip_features)


def _reader_of(folder: Path) -> Callable[..., Any]:
    """What reads a base of the architecture that model_index.json names.

    Errors: `UserError` for one that is not supported.
    """
    index = folder / "model_index.json"
    kind = read_json(index).get("_class_name") if index.exists() else None
    read = registry.find("architecture", kind or "StableDiffusionPipeline")
    if read is None:
        known = ", ".join(registry.names("architecture"))
        raise UserError(f"{index} describes a {kind}, which is not supported; give a base of the kind {known}.")
    return read
