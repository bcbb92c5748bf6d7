"""A tiny base with random weights, and a folder of its files."""

import pytest

from e4t_jax import bases
from e4t_jax.testing import tiny_base


@pytest.fixture(scope="module")
def base_and_params():
    return tiny_base()


@pytest.fixture
def folder(base_and_params, tmp_path):
    """A base on disk."""
    bases.save_folder(tmp_path / "base", *base_and_params)
    return tmp_path / "base"
