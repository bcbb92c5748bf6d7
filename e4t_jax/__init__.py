"""E4T in JAX: personalise a text-to-image model from one picture in five steps (arXiv 2302.12228).

import e4t_jax as e4t
domain = e4t.load_domain("creatures")
concepts = domain.tune(["venus.png", "ada.png"], steps=5)
images = domain.generate(concepts, ["a photo of *s in the snow"], seed=0)
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Concept": "e4t_jax.concept",
    "Domain": "e4t_jax.domain",
    "UserError": "e4t_jax.errors",
    "load_concept": "e4t_jax.concept",
    "load_domain": "e4t_jax.domain",
    "save_concept": "e4t_jax.concept",
    "save_domain": "e4t_jax.domain",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    # On first use: the libraries behind these take seconds to import, which `import e4t_jax` alone should not.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'e4t_jax' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
