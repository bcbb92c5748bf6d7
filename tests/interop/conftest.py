"""A concept whose change is not small, in memory and as files."""

import jax
import jax.numpy as jnp
import pytest

from e4t_jax import bases
from e4t_jax.concept import Concept
from e4t_jax.domain import Domain
from e4t_jax.files.concept_files import save_concept
from e4t_jax.files.domain_files import load_domain, save_domain
from e4t_jax.objective import Trainable
from e4t_jax.offsets import init_factors


@pytest.fixture(scope="package")
def concept(domain):
    """A concept whose offsets and residual are random and not small."""
    keys = jax.random.split(jax.random.key(3), 3)
    factors = init_factors(keys[0], domain.base.offset_kernels(domain.base.param_shapes()["unet"]), rank=1)
    factors = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(keys[1], leaf.shape), factors)
    residual = jax.random.normal(keys[2], (domain.base.text_width,))
    folded = jnp.linspace(-1, 1, domain.base.image_encoder.width)
    return Concept("venus", "compact", domain.fingerprint, Trainable(factors, residual=residual), folded)


@pytest.fixture(scope="package")
def saved(domain, concept, tmp_path_factory):
    """A folder with base, domain and concept as files."""
    folder = tmp_path_factory.mktemp("saved")
    bases.save_folder(folder / "base", domain.base, domain.params)
    base, params = bases.load_folder(folder / "base")
    save_domain(folder / "domain", Domain(str(folder / "base"), "creature", base, params, domain.encoder, domain.factors))
    save_concept(folder / "venus.safetensors", concept._replace(domain=load_domain(folder / "domain").fingerprint))
    return folder
