"""Compiled programs that are kept between runs: a process that is killed while it keeps one spoils nothing."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import compilation_cache as kept

from e4t_jax.tuning.compiled_cache import forget_unfinished_programs


@pytest.fixture
def keep_in(tmp_path):
    """JAX keeps every program in a folder of this test's, of a bounded size, as the commands have it."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_compilation_cache_max_size": 2**30,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    kept.compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    kept.compilation_cache.reset_cache()


def names(folder):
    return {path.name for path in folder.glob("*-cache")}


def test_a_program_that_was_half_kept_is_kept_anew(keep_in, recwarn):
    """JAX itself would read the half for ever, and write none after it."""

    def half_kept(number):
        jax.jit(lambda x: x * number + 1)(jnp.ones(3)).block_until_ready()
        (name,) = (path for path in keep_in.glob("jit__lambda*-cache"))
        return name

    whole = half_kept(2)
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    whole.with_name(whole.name.removesuffix("-cache") + "-atime").unlink()
    forget_unfinished_programs(keep_in)
    assert whole.exists()  # another process may be about to finish it
    os.utime(whole, (0, 0))
    others = names(keep_in) - {whole.name}
    forget_unfinished_programs(keep_in)
    assert not whole.exists() and names(keep_in) == others
    jax.clear_caches()
    recwarn.clear()
    assert half_kept(2) == whole and whole.read_bytes()
    assert not [str(one.message) for one in recwarn if "compilation cache" in str(one.message)]


SCRIPT = """
import jax, jax.numpy as jnp
import e4t_jax as e4t
jnp.ones(3).block_until_ready()  # something was compiled before
folder = e4t.keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
jax.jit(lambda x: x @ x + 1)(jnp.ones((8, 8))).block_until_ready()
print(folder, any(hits))
"""


def run_script(**changes):
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": os.getcwd(), **changes}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_program_of_ones_own_keeps_what_it_compiles(tmp_path):
    """The second process reads what the first compiled."""
    where = str(tmp_path / "e4t-jax" / "compiled")
    assert run_script(XDG_CACHE_HOME=str(tmp_path)) == [where, "False"]
    assert run_script(XDG_CACHE_HOME=str(tmp_path)) == [where, "True"]


def test_a_folder_that_jax_was_told_of_stays_and_one_that_cannot_be_written_is_no_error(tmp_path):
    assert run_script(JAX_COMPILATION_CACHE_DIR=str(tmp_path)) == [str(tmp_path), "False"]
    assert run_script(XDG_CACHE_HOME="/proc") == ["/proc/e4t-jax/compiled", "False"]
