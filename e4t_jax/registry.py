"""What can be asked for by name, as "module:function", imported on demand: nothing below the embedded world imports it.

    base    name -> () -> folder of a base model
    domain  name -> () -> folder of a domain
    data    name -> (folder for prepared files) -> a source for `grain.MapDataset.source`: rows with image, mask, caption
    look    name of data -> (domain that is learned on it) -> a `pretraining.previews.Look` at it, in place of
            `pretraining.previews.look_at`

Another package adds its own names with `register`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal

Kind = Literal["base", "domain", "data", "look"]
_ENTRIES: dict[str, dict[str, str]] = {
    "base": {"creatures": "e4t_jax.creatures.shipped:base_folder"},
    "domain": {"creatures": "e4t_jax.creatures.shipped:domain_folder"},
    "data": {"creatures": "e4t_jax.creatures.world.dataset:open_creatures", "fish": "e4t_jax.creatures.world.dataset:open_fish"},
    "look": dict.fromkeys(("creatures", "fish"), "e4t_jax.creatures.judging.validation:look_at_validation"),
}


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
