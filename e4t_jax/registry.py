"""What can be asked for by name, as "module:function", imported on demand: nothing below the drawn world imports it.

    base          name -> () -> folder of a base model
    domain        name -> () -> folder of a domain
    data          name -> (folder for prepared files) -> a source for `grain.MapDataset.source`: rows with image, mask, caption
    preview       name of data -> (domain learned on it) -> a `previews.Preview`, where another than `previews.preview` is wanted
    preset        name of data or of a base -> () -> the `pretraining.settings.Preset` that is taken where none is given
    architecture  `_class_name` of model_index.json -> what reads a base from a folder (`bases.load`)
    image_encoder `model_type` of config.json -> what makes a `bases.ImageEncoder` of it (`bases.image_encoders`)

Another package adds its own names with `register`. Tables whose rows lie in memory anyway (`tuning.scopes.SCOPES`,
`samplers.METHODS`, `evaluation.metrics.METRICS`) are plain dicts with typed rows: there is nothing to import on demand.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, get_args

Kind = Literal["base", "domain", "data", "preview", "preset", "architecture", "image_encoder"]
_WORLD = "e4t_jax.creatures"
_ENTRIES: dict[str, dict[str, str]] = {kind: {} for kind in get_args(Kind)}


def register(kind: Kind, name: str, target: str) -> None:
    """Adds a name; `target` is "module:function"."""
    _ENTRIES[kind][name] = target


def find(kind: Kind, name: str) -> Callable[..., Any] | None:
    """What `name` stands for, or None where nothing of that name is registered."""
    target = _ENTRIES[kind].get(name)
    return load(target) if target else None


def names(kind: Kind) -> list[str]:
    """All names of a kind, sorted."""
    return sorted(_ENTRIES[kind])


def load(target: str) -> Any:
    """The object that "module:name" names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


register("base", "creatures", f"{_WORLD}.shipped:base_folder")
register("domain", "creatures", f"{_WORLD}.shipped:domain_folder")
register("domain", "faces", "e4t_jax.interop.e4t_diffusion.public_domains:faces_folder")
register("architecture", "StableDiffusionPipeline", "e4t_jax.bases.stable_diffusion.folder:open_folder")
for _name in ("clip", "clip_vision_model"):
    register("image_encoder", _name, "e4t_jax.bases.image_encoders.clip:make")
for _name in ("creatures", "fish"):
    register("data", _name, f"{_WORLD}.world.dataset:open_{_name}")
    register("preview", _name, f"{_WORLD}.judging.validation:look_at_validation")
    register("preset", _name, f"{_WORLD}.presets:{_name}")
