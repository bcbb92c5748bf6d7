"""Settings of all tests: two host devices, signatures checked, compiled programs kept on disk, not in memory."""

import collections
import ctypes
import gc
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir(), "e4t_jax_tests_cache")))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

_ROOM = 3 * 2**29  # bytes that a worker may hold before it forgets compiled programs

# Every function of the package checks the shapes and dtypes of its signature, in tests.
install_import_hook("e4t_jax", "typechecker.check")

import jax
import jax.numpy as jnp
import pytest


def pytest_collection_modifyitems(items):
    """Modules that compile most come first, lest one worker be left with them at the end."""
    compiling = collections.Counter(item.path for item in items if item.get_closest_marker("compiles"))
    items.sort(key=lambda item: -compiling[item.path])


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """They pile up to gigabytes over the modules of a worker."""
    yield
    jax.clear_caches()
    gc.collect()
    return_freed_memory()


@pytest.fixture(autouse=True, scope="module")
def compile_lightly(request):
    """Tiny programs take longer to optimise than to run; a module whose programs compute for long says `OPTIMISED = True`."""
    jax.config.update("jax_disable_most_optimizations", not getattr(request.module, "OPTIMISED", False))


@pytest.fixture(autouse=True)
def keep_what_is_compiling_small():
    """The compiler's scratch memory, too, piles up over the tests of a module; of many programs, those before are forgotten."""
    yield
    return_freed_memory()
    if sys.platform == "linux" and int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() > _ROOM:
        jax.clear_caches()
        gc.collect()
        return_freed_memory()


def return_freed_memory():
    """glibc keeps what was freed in many threads for itself until it is asked."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def domain():
    """A tiny domain with random weights and offsets that do something."""
    from e4t_jax.testing import tiny_domain

    return tiny_domain()


@pytest.fixture(scope="session")
def concept_batch(domain):
    """Four random pictures' latents, features and prompts, with a mask."""
    from e4t_jax.objective import ConceptBatch

    keys = jax.random.split(jax.random.key(2), 3)
    prompts = ["*s", "a photo of *s", "a cartoon of *s in the snow", "*s in the city"]
    ids, placeholder = domain.tokenize(prompts)
    return ConceptBatch(
        latents=jax.random.normal(keys[0], (4, *domain.base.latent_shape)),
        clip=jax.random.normal(keys[1], (4, domain.base.image_encoder.count, domain.base.image_encoder.width)),
        ids=jnp.asarray(ids),
        placeholder=jnp.asarray(placeholder),
        mask=jax.random.uniform(keys[2], (4, *domain.base.latent_shape[:2])),
    )


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB, where the system lets one be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    except OSError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting is not permitted")
    yield disk
    subprocess.run(["umount", disk], check=True)
