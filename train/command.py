"""What every script shares: typed arguments, one clear line for a user's mistake, progress bars."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_type_hints

import jax
import tyro
from tqdm import tqdm

from e4t_jax.errors import UserError

_CACHE_BYTES = 2 * 2**30  # the programs used longest ago make room


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Options that all scripts share."""

    cache: bool = True
    """Keep compiled programs for the next run, in the user's cache folder or $JAX_COMPILATION_CACHE_DIR: it starts sooner."""


def keep_compiled_programs() -> None:
    """Compilation takes longer than tuning: what one run compiled, the next one reads."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "e4t-jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def run(main: Callable[[Any], None]) -> None:
    """Reads the command line into `main`'s one dataclass argument and calls it; a `UserError` ends with one line and status 1."""
    config_type = get_type_hints(main)["config"]
    config = tyro.cli(config_type, description=config_type.__doc__)
    if config.cache:
        keep_compiled_programs()
    try:
        main(config)
    except UserError as error:
        sys.exit(f"Error: {error}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"Error: out of memory; lower {_lowers_memory(config_type)}.")
    except KeyboardInterrupt:
        sys.exit("Stopped.")


def _lowers_memory(config_type: type) -> str:
    """The flags of this script that memory grows with."""
    names = {field.name for field in dataclasses.fields(config_type)}
    flags = [name for name in ("batch_size", "concepts", "images", "prompts") if name in names]
    return " or ".join(f"--{flag.replace('_', '-')}" for flag in flags) or "the size of the model"


def progress(items: Iterable, description: str, **options: Any) -> tqdm:
    """A progress bar with rate and time left, on the error stream."""
    return tqdm(items, desc=description, mininterval=1.0, dynamic_ncols=True, **options)


def use_all_cores() -> None:
    """One JAX device a core where there is no accelerator: two cores compute a split batch 1.6 times as fast that way."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
