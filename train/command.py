"""What every script shares: typed arguments, one clear line for a user's mistake, progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import tyro
from tqdm import tqdm

from e4t_jax.errors import UserError


def run(main: Callable[[Any], None]) -> None:
    """Reads the command line into `main`'s one dataclass argument and calls it; a `UserError` ends with one line and status 1."""
    config_type = get_type_hints(main)["config"]
    config = tyro.cli(config_type, description=config_type.__doc__)
    try:
        main(config)
    except UserError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped.")


def progress(items: Iterable, description: str, **options: Any) -> tqdm:
    """A progress bar with rate and time left, on the error stream."""
    return tqdm(items, desc=description, mininterval=1.0, dynamic_ncols=True, **options)
