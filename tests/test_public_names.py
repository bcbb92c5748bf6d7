"""What `import e4t_jax` offers: lazily, completely, with a version."""

import subprocess
import sys

import pytest

import e4t_jax


def test_every_public_name_is_there():
    for name in e4t_jax.__all__:
        assert getattr(e4t_jax, name).__name__ == name
        assert name in dir(e4t_jax)


def test_every_public_name_has_one_home():
    assert sorted(name for names in e4t_jax._HOMES.values() for name in names) == sorted(e4t_jax.__all__)


def test_version_is_that_of_the_installed_package():
    assert e4t_jax.__version__.count(".") == 2


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'tune_all'"):
        _ = e4t_jax.tune_all


def test_importing_costs_no_jax():
    code = "import sys, e4t_jax; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_importing_a_command_costs_no_library_that_only_its_work_needs():
    """Where PyTorch is installed, transformers imports it: seconds, which `--help` and a mistake in a flag should not take."""
    code = """
import importlib, sys
from e4t_jax.cli.main import COMMANDS
for module, _ in COMMANDS.values():
    importlib.import_module("e4t_jax.cli." + module)
print(sorted({"torch", "transformers", "grain", "orbax", "tensorflow_datasets"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stdout + done.stderr
