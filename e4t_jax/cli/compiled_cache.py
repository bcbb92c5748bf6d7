"""Compiled programs kept on disk from one run to the next."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from e4t_jax.storage import user_cache

_CACHE_BYTES = 2 * 2**30  # the programs used longest ago make room
_UNFINISHED_FOR = 60  # seconds


def keep_compiled_programs() -> None:
    """Compilation takes longer than tuning: what one run compiled, the next one reads."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = user_cache() / "compiled"
    forget_unfinished_programs(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def forget_unfinished_programs(folder: Path) -> None:
    """Removes what a process left that was killed while it kept a program: JAX would warn of it ever after, and keep no other.

    Such a program has no file that says when it was last used, which is written after it; one of the last minute may get it yet.
    """
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            stamp = path.with_name(f"{path.name.removesuffix('-cache')}-atime")
            if not stamp.exists() and time.time() - path.stat().st_mtime > _UNFINISHED_FOR:
                path.unlink()
