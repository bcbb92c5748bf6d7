"""E4T in JAX: personalise a text-to-image model from one picture in five steps (arXiv 2302.12228).

    import e4t_jax as e4t
    domain = e4t.load_domain("creatures")
    concepts = domain.tune(["venus.png", "ada.png"], steps=5)
    images = domain.generate(concepts, ["a photo of *s in the snow"], seed=0)

`__all__` names what is public; every module documents the rest for those who extend it.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e4t_jax.bases import load_base
    from e4t_jax.concept import Concept
    from e4t_jax.domain import Domain, to_pil
    from e4t_jax.errors import UserError
    from e4t_jax.files.concept_files import load_concept, save_concept
    from e4t_jax.files.domain_files import load_domain, save_domain
    from e4t_jax.interop.diffusers import export_concept
    from e4t_jax.interop.e4t_diffusion import export_domain, import_checkpoint
    from e4t_jax.pretraining.pretrain import pretrain
    from e4t_jax.pretraining.settings import DomainSettings
    from e4t_jax.pretraining.step import PretrainSettings
    from e4t_jax.sample import SampleSettings
    from e4t_jax.tuning.compiled_cache import keep_programs
    from e4t_jax.tuning.tune import TuneSettings
    from e4t_jax.tuning.tuner import Tuner

    __version__: str

_HOMES = {
    "e4t_jax.bases": ("load_base",),
    "e4t_jax.concept": ("Concept",),
    "e4t_jax.files.concept_files": ("load_concept", "save_concept"),
    "e4t_jax.domain": ("Domain", "to_pil"),
    "e4t_jax.files.domain_files": ("load_domain", "save_domain"),
    "e4t_jax.errors": ("UserError",),
    "e4t_jax.interop.diffusers": ("export_concept",),
    "e4t_jax.interop.e4t_diffusion": ("export_domain", "import_checkpoint"),
    "e4t_jax.pretraining.pretrain": ("pretrain",),
    "e4t_jax.pretraining.settings": ("DomainSettings",),
    "e4t_jax.sample": ("SampleSettings",),
    "e4t_jax.tuning.tuner": ("Tuner",),
    "e4t_jax.pretraining.step": ("PretrainSettings",),
    "e4t_jax.tuning.compiled_cache": ("keep_programs",),
    "e4t_jax.tuning.tune": ("TuneSettings",),
}
__all__ = [
    "Concept",
    "Domain",
    "DomainSettings",
    "PretrainSettings",
    "SampleSettings",
    "TuneSettings",
    "Tuner",
    "UserError",
    "export_concept",
    "export_domain",
    "import_checkpoint",
    "keep_programs",
    "load_base",
    "load_concept",
    "load_domain",
    "pretrain",
    "save_concept",
    "save_domain",
    "to_pil",
]


def __getattr__(name: str) -> Any:
    # On first use: the libraries behind these take seconds to import, which `import e4t_jax` alone should not.
    if name == "__version__":
        return metadata.version("e4t-jax")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'e4t_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
