"""What the benchmarks run on: the shipped domain, or a base by name with encoder and offsets before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from e4t_jax.domain import Domain

BASE_HELP = 'the shipped domain on "creatures"; or a base of any other name, such as random:sd15, with an untrained domain on it'


def subject(base_name: str, **policy: str) -> Domain:
    """The domain on that base; `policy` is that of `load_base`.

    Errors: `UserError` for a name that leads nowhere.
    """
    from e4t_jax.bases import load_base
    from e4t_jax.creatures.learning.ladder import untrained_domain
    from e4t_jax.files.domain_files import load_domain

    if base_name == "creatures":
        return load_domain(base_name, **policy)
    return untrained_domain(*load_base(base_name, **policy))
