"""Compiled programs kept on disk from one run to the next."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_CACHE_BYTES = 2 * 2**30  # the programs used longest ago make room
_UNFINISHED_FOR = 60  # seconds


def keep_programs(folder: str | Path | None = None) -> Path | None:
    """Keeps compiled programs on disk: what one process compiled, the next one reads. Compilation takes longer than tuning.

    All commands do so; a program of one's own calls this first.

        e4t.keep_programs()

    Args:
        folder: Where they are kept; the user's cache folder where not given, e4t-jax/compiled in `$XDG_CACHE_HOME` or `~/.cache`. A
            folder that JAX was told of before (`$JAX_COMPILATION_CACHE_DIR`, `jax_compilation_cache_dir`) stays.

    Returns: The folder; None where the user has none.

    Errors: none; a folder that cannot be written keeps nothing.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = os.environ.get("JAX_COMPILATION_CACHE_DIR") or getattr(jax.config, "jax_compilation_cache_dir", None)
    if before:
        return Path(before)
    try:
        home = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "e4t-jax" / "compiled"
    except RuntimeError:  # nobody's home is known
        return None
    forget_unfinished_programs(home)
    jax.config.update("jax_compilation_cache_dir", str(home))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    compilation_cache.reset_cache()  # JAX looks for a folder once, when it first compiles anything
    return home


def forget_unfinished_programs(folder: Path) -> None:
    """Removes what a process left that was killed while it kept a program: JAX would warn of it ever after, and keep no other.

    Such a program has no file that says when it was last used, which is written after it; one of the last minute may get it yet.
    """
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            stamp = path.with_name(f"{path.name.removesuffix('-cache')}-atime")
            if not stamp.exists() and time.time() - path.stat().st_mtime > _UNFINISHED_FOR:
                path.unlink()
